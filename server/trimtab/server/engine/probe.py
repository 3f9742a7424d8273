"""What a bundle's latents read in a request's prompt, taken from the stream while the engine runs it; nothing is changed.

    service   `read`: one request with PROBE in its `extra_args`, past the prefix cache, for one token; then `trimtab_take`
    worker    `Probes`: at the bundle's layer φ(e · h + b) of each prompt row, the largest few kept by position

h is read before the layer's own edits, as the formula reads it. Like the edits, a probe never raises into vLLM: what went wrong
is told instead of the reading. A CUDA graph is replayed without the operator's body, so an engine of graphs is refused.

Axes: N rows of the step, D d_model, K latents of the bundle, P positions of the prompt, T latents kept.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from trimtab.server.engine.tables import Tables
from trimtab.server.errors import NotApplied, Unsupported

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

__all__ = ["PROBE", "Probes", "Reading", "take", "wire"]

PROBE = "trimtab_probe"
"""The key of a probe in `SamplingParams.extra_args`."""
MAX_KEPT = 64
"""Finished readings that nobody has taken."""
_log = logging.getLogger(__name__)


class Reading(NamedTuple):
    """What fired, by position; rows of the bundle, −1 beyond those that did."""

    rows_PT: Any
    activations_PT: Any


class _Probe:
    """One request's reading in this worker."""

    def __init__(self, text: str, n_prompt: int) -> None:
        asked = json.loads(text)
        self.id: str = asked["id"]
        self.bundle: str = asked["bundle"]
        self.layer: int = asked["layer"]
        self.n_prompt = n_prompt
        self.top: int = asked["top"]
        self.failure: str | None = None
        self.seen_P = np.zeros(n_prompt, bool)
        self.rows_PT = np.full((n_prompt, self.top), -1, np.int64)
        self.activations_PT = np.zeros((n_prompt, self.top), np.float32)


class _Span(NamedTuple):
    """Rows [start, stop) of the step's batch, of which the first is at `position`."""

    probe: _Probe
    start: int
    stop: int
    position: int


class Probes:
    """The probes of a worker's requests."""

    def __init__(self, tables: Tables, layers: Iterable[int]) -> None:
        self._tables = tables
        self._layers = frozenset(layers)
        self.running: dict[str, _Probe] = {}
        """By request."""
        self._kept: OrderedDict[str, _Probe] = OrderedDict()
        self.step: dict[int, list[_Span]] = {}
        """By layer, what to read in this forward."""

    def arrive(self, request_id: str, text: str, n_prompt: int) -> None:
        """A request with a probe is scheduled for the first time, or again after a preemption."""
        if request_id in self.running:
            return
        probe = self.running[request_id] = _Probe(text, n_prompt)
        if probe.layer not in self._layers:
            probe.failure = f"layer {probe.layer} is not hooked in this worker"
        if probe.bundle not in self._tables.bundles:
            probe.failure = f"bundle {probe.bundle} is not loaded in this worker"
        self._kept[probe.id] = probe
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def finish(self, request_ids: Iterable[str]) -> None:
        """Requests have ended; a reading stays until it is taken."""
        for request_id in request_ids:
            self.running.pop(request_id, None)

    def prepare(self, request_ids: Sequence[str], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Before a forward, as `EditState.prepare`."""
        self.step = {}
        row = 0
        for request_id, first, n in zip(request_ids, starts, lengths, strict=True):
            probe = self.running.get(request_id)
            if probe is not None and probe.failure is None and (last := min(first + n, probe.n_prompt)) > first:
                span = _Span(probe, row, row + last - first, first)
                self.step.setdefault(probe.layer, []).append(span)
            row += n

    def read(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """In a forward: the layer's rows that are probed, before they are edited."""
        for span in self.step[layer]:
            try:
                self._read(span, hidden, residual)
            except Exception as e:  # noqa: BLE001 — told by the reading.
                _log.exception("trimtab: the probe of layer %d failed", layer)
                span.probe.failure = f"the probe of layer {layer} raised {type(e).__name__}: {e}"

    def _read(self, span: _Span, hidden: Tensor, residual: Tensor | None) -> None:
        probe, rows = span.probe, self._tables.bundles[span.probe.bundle]["latent"]
        h_ND = hidden[span.start : span.stop].float()
        if residual is not None:
            h_ND = h_ND + residual[span.start : span.stop].float()
        a_NK = torch.addmm(rows.b_K, h_ND, rows.e_KD.T)
        a_NK = torch.where(a_NK > rows.theta_K, a_NK, 0.0).clamp_min(0.0)
        top = torch.topk(a_NK, min(probe.top, a_NK.shape[1]), dim=1)
        values, indices = top.values.cpu().numpy(), top.indices.cpu().numpy()
        at = slice(span.position, span.position + len(values))
        probe.activations_PT[at, : values.shape[1]] = values
        probe.rows_PT[at, : values.shape[1]] = np.where(values > 0, indices, -1)
        probe.seen_P[at] = True

    def take(self, probe_id: str) -> dict[str, Any] | str | None:
        """A reading, told once, or why there is none; None when this worker never had it."""
        probe = self._kept.pop(probe_id, None)
        if probe is None:
            return None
        if probe.failure is not None:
            return probe.failure
        if not probe.seen_P.all():
            return f"{int((~probe.seen_P).sum())} of {probe.n_prompt} positions were not run"
        return {"rows": probe.rows_PT.tolist(), "activations": probe.activations_PT.tolist()}


def wire(bundle: str, layer: int, top: int) -> tuple[str, str]:
    """The id of a new probe, and its text for `extra_args`."""
    probe_id = uuid4().hex
    return probe_id, json.dumps({"id": probe_id, "bundle": bundle, "layer": layer, "top": top})


async def take(engine: "EngineClient", probe_id: str) -> Reading:
    """The reading of a probe whose request has finished.

    Raises:
        NotApplied: no worker has it whole.
    """
    core: Any = getattr(engine, "engine_core", None)
    if core is None or not hasattr(core, "call_utility_all_async"):
        raise Unsupported(f"probes cannot be read through {type(engine).__name__}; use vLLM's AsyncLLM")
    parts = await core.call_utility_all_async("collective_rpc", "trimtab_take_probe", None, (probe_id,))
    answers = [answer for part in parts for answer in part if answer is not None]
    found = next((answer for answer in answers if isinstance(answer, dict)), None)
    if found is None:
        raise NotApplied(f"the latents were not read: {next(iter(answers), 'no worker has the reading')}")
    return Reading(found["rows"], found["activations"])
