"""The worker's side: install the edit on a loaded model, and the RPC methods that the front end calls through `collective_rpc`.

`install` runs right after the weights are loaded and before the first forward, hence before compilation, profiling and graph
capture. A model that cannot be steered is not an error of the worker: the refusal is kept, told by the handshake, and every
plan is refused.
"""

import functools
import logging
from typing import Any

import torch

from trimtab.attribution.bundle import Bundle, BundleError
from trimtab.server.engine import layers, op, runner_v1, runner_v2
from trimtab.server.engine.admission import uses_graphs
from trimtab.server.engine.device_path import DevicePath
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.kinds import KINDS, Kind
from trimtab.server.engine.measurement import Measurement, verdict
from trimtab.server.engine.pin import PLUGIN_VERSION, VLLM_VERSION
from trimtab.server.engine.tables import Tables
from trimtab.server.errors import Unsupported

__all__ = ["Steering", "install", "patch"]

_log = logging.getLogger(__name__)
_SLOTS_PER_REQUEST = 3
"""Position 0, the prompt, the completion. More windows are more segments, whose slots are gathered again when room is short."""
_LEAST_SLOTS = 256
"""Of a `DevicePath`: a prompt that is prefilled in one step may cross many windows."""


class Steering:
    """What the plugin keeps on a worker as `worker.trimtab`."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.refusal: str | None = None
        self.state: EditState | None = None
        config = worker.vllm_config
        asked = (config.additional_config or {}).get("trimtab", {})
        self._declared: dict[str, Kind] = asked.get("kinds", {})
        """Class of a decoder layer that the table does not list → kind that the operator says it is."""
        self._unlisted = layers.unlisted(worker.model_runner.get_model())
        """Classes that are not measured yet."""
        self._measurement: Measurement | None = None
        try:
            self.state = self._install(worker.model_runner, config, asked.get("layers"))
        except Unsupported as e:
            self.refusal = e.message
            _log.warning("trimtab: this engine cannot be steered: %s", e.message)
        else:
            if self._unlisted:
                self.refusal = (
                    f"the kinds declared for {', '.join(self._unlisted)} are not measured yet; the handshake does it"
                )

    def _install(self, runner: Any, config: Any, wanted: list[int] | None) -> EditState:
        points = layers.find(runner.get_model(), wanted, declared=self._declared, dtype=config.model_config.dtype)
        for point in points:
            if "forward" in vars(point.module):
                raise Unsupported(f"layer {point.layer}'s forward was replaced (weight offloading); start without it")
        n_slots = _SLOTS_PER_REQUEST * config.scheduler_config.max_num_seqs
        device, numbers = torch.device(runner.device), [point.layer for point in points]
        elsewhere = [layer for layer in layers.elsewhere(runner.get_model()) if wanted is None or layer in wanted]
        adapter = runner_v2 if hasattr(runner, "gather_batch_req_state") else runner_v1
        special_V = _special_tokens(config.model_config, device)
        graphs = uses_graphs(config)
        tables, path = Tables(device, n_slots, fold=not graphs), None
        if graphs and points:
            n_rows, d_model = config.scheduler_config.max_num_batched_tokens, config.model_config.get_hidden_size()
            n_slots = max(n_slots, _LEAST_SLOTS)
            path = DevicePath(
                numbers,
                d_model,
                n_slots,
                n_rows,
                tables.row,
                adapter.token_ids(runner),
                special_V,
                config.model_config.dtype,
            )
        state = EditState(numbers, tables, path, elsewhere)
        state.speaks = _speaks()
        state.special_V = special_V
        adapter.install(runner, state)
        op.bind(state)
        hooks = op.Hooks(points)
        if config.model_config.enforce_eager and not graphs:
            state.hooks = hooks
        # A graph compiled without the plugin must never be loaded with it: the identity is part of the compile-cache key.
        identity = {
            "plugin": PLUGIN_VERSION,
            "op": op.SCHEMA_VERSION,
            "layers": numbers,
            "read_as": [point.kind for point in points],
            "graphs": graphs,
        }
        config.additional_config = {**(config.additional_config or {}), "trimtab": identity}
        return state

    def load_bundle(self, data: bytes) -> str:
        """The content hash, or a sentence that says why not."""
        if self.state is None or self.refusal is not None:
            return self.refusal or "this worker cannot steer"
        try:
            bundle = Bundle.from_bytes(data)
        except BundleError as e:
            return str(e)
        width = self.worker.model_config.get_hidden_size()
        if bundle.header.model.d_model != width:
            return f"its rows are {bundle.header.model.d_model} wide and the model is {width} wide"
        steerable = self.state.elsewhere | self.state.layers.keys()
        if bundle.header.layer not in steerable:
            return f"it is for layer {bundle.header.layer}, and this engine's steerable layers are {sorted(steerable)}"
        self.state.tables.load(bundle)
        return bundle.content_hash

    def unload_bundle(self, content_hash: str) -> bool:
        """Whether it was dropped; False while a running request still uses it."""
        return self.state is not None and self.state.unload(content_hash)

    def take_probe(self, probe_id: str) -> dict[str, Any] | str | None:
        """What a probe has read; see `Probes.take`."""
        return self.refusal if self.state is None else self.state.probes.take(probe_id)

    def measure(self) -> int:
        """Begin to measure what the decoder layers are; how many requests that takes."""
        runner = self.worker.model_runner
        self._measurement = Measurement(runner.get_model(), runner.model_config.get_hidden_size())
        return self._measurement.n_requests

    def measured(self) -> list[dict[str, Any]]:
        """End it: a `Reading` of each layer. A declared kind is now confirmed, or the reason to refuse."""
        if self._measurement is None:
            return []
        readings, self._measurement = self._measurement.end(), None
        wrong = [r for r in readings if r.name not in KINDS and r.kind != self._declared.get(r.name, r.kind)]
        if wrong:
            self.refusal = f"{wrong[0].name} was declared {self._declared[wrong[0].name]!r}; {verdict(readings)}"
        elif self.state is not None:
            self.refusal = None
        elif self._unlisted:
            self.refusal = f"{self.refusal}; {verdict(readings)}"
        self._unlisted = []
        return [reading._asdict() for reading in readings]

    def handshake(self) -> dict[str, Any]:
        """This rank's report; a forward is run first if there was none yet."""
        runner = self.worker.model_runner
        if self.state is not None and not all(layer.calls for layer in self.state.layers.values()):
            runner._dummy_run(1)
        state = self.state
        return {
            "core": self.worker.parallel_config.data_parallel_index,
            "rank": self.worker.rank,
            "stage": self.worker.rank // self.worker.parallel_config.tensor_parallel_size,
            "plugin": PLUGIN_VERSION,
            "vllm": VLLM_VERSION,
            "runner": "v2" if hasattr(runner, "gather_batch_req_state") else "v1",
            "refusal": self.refusal,
            "unmeasured": self._unlisted,
            "computed_by": state.path.computed_by if state and state.path else "host",
            "layers": sorted(state.layers) if state else [],
            "elsewhere": sorted(state.elsewhere) if state else [],
            "calls": {str(layer): entry.calls for layer, entry in state.layers.items()} if state else {},
            "bundles": sorted(state.tables.bundles) if state else [],
            "requests": state.n_requests if state else 0,
            "slots": state.n_slots if state else 0,
            "gates": state.n_gates if state else 0,
        }


def _speaks() -> bool:
    """Whether this rank's output is the one that the scheduler reads: the first of the last pipeline stage."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return bool(get_pp_group().is_last_rank and get_tp_group().is_first_rank)


def _special_tokens(config: Any, device: torch.device) -> torch.Tensor | None:
    """Whether each token of the vocabulary is special, by its role or as it was added; None without a tokenizer."""
    if config.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer: Any = cached_tokenizer_from_config(config)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    found = torch.zeros(max(config.get_vocab_size(), *special, 0) + 1, dtype=torch.bool)
    found[list(special)] = True
    return found.to(device)


def install(worker: Any) -> None:
    """Make this worker steer, once its model is loaded."""
    load_model = worker.load_model

    @functools.wraps(load_model)
    def _load_model(*args: Any, **kwargs: Any) -> Any:
        result = load_model(*args, **kwargs)
        worker.trimtab = Steering(worker)
        return result

    worker.load_model = _load_model


def patch() -> None:
    """Every worker of this process installs the plugin, and answers its RPC methods."""
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device

    # Plugins are loaded inside init_worker; init_device is the first call after it, and load_model the next.
    @functools.wraps(init_device)
    def _init_device(self: Any) -> Any:
        result = init_device(self)  # type: ignore[no-untyped-call]
        install(self.worker)
        return result

    WorkerWrapperBase.init_device = _init_device  # type: ignore[method-assign]
    for name in ("load_bundle", "unload_bundle", "take_probe", "handshake", "measure", "measured"):
        setattr(WorkerBase, f"trimtab_{name}", _remote(name))


def _remote(name: str) -> Any:
    def call(self: Any, *args: Any) -> Any:
        return getattr(self.trimtab, name)(*args)

    call.__name__ = f"trimtab_{name}"
    return call
