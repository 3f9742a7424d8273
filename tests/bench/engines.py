"""The engines under test, each in a process of its own, resident for the whole run; one works at a time, the others wait.

A process answers each `Ask` with a `Took`.
"""

import ctypes.util
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.conditions import (
    CONDITIONS,
    D_MODEL,
    LAYER,
    N_LATENTS,
    N_LAYERS,
    STRONG,
    Cell,
    all_bundles,
    plan,
    prompts,
)
from tests.bench.cores import Clocks, cpu_seconds, models, part_cores
from tests.bench.pages import can_gather, gather
from tests.processes import descendants
from trimtab.attribution.embedded import model_path
from trimtab.server.engine import proof
from trimtab.server.engine.proof import KEY

__all__ = [
    "ENGINES",
    "LENS_FOLDER",
    "Ask",
    "Engine",
    "Took",
    "allocator",
    "sampling",
    "start",
    "vllm",
]

ENGINES = ("plain", "trimtab", "plain again", "trimtab again", "vllm-lens", "transformers")
LENS_FOLDER = Path("build/bench/lens")
PLUGINS = {"plain": "", "plain again": "", "trimtab": "trimtab", "trimtab again": "trimtab", "vllm-lens": "activations"}


class Ask(NamedTuple):
    """One measured run."""

    cell: Cell
    condition: str
    round_: int
    strong: bool = False
    """Edits that change what is generated, on everybody's prompts."""

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids."""
        return prompts(self.cell, "" if self.strong else self.condition, self.round_)

    def which(self, i: int) -> int:
        """The number of request i's edit."""
        return i % (CONDITIONS[self.condition].distinct or self.cell.n) + (STRONG if self.strong else 0)


class Took(NamedTuple):
    """What it took."""

    seconds: float
    worker_cpu: float
    """CPU seconds of the process that runs the model."""
    cpu: float
    """CPU seconds of all of the engine's processes."""
    first_token: float | None
    """Median seconds to the first token."""
    tokens: list[list[int]] | None
    """What was generated, where the edits are strong."""


class Engine:
    """A process that runs one engine."""

    def __init__(self, name: str, connection: "Connection[Any, Any]", process: Any) -> None:
        self.name = name
        self._connection = connection
        self._process = process

    def run(self, ask: Ask) -> Took:
        """Run one condition."""
        self.begin(ask)
        return Took(*self.answer())

    def begin(self, ask: Ask) -> None:
        """Let one condition run; `answer` gives what it took."""
        self._connection.send(ask)

    def answers(self, seconds: float) -> bool:
        """Whether there is an answer within this time."""
        return self._connection.poll(seconds)

    def pause(self) -> None:
        """Stop the engine's processes where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    @cached_property
    def _family(self) -> tuple[int, ...]:
        """The processes of an engine that is ready: looked for once, as turns are timed."""
        return (self._process.pid, *descendants(self._process.pid))

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._family:
            os.kill(pid, number)

    def gather(self) -> None:
        """Put the memory of the process that runs the model into huge pages, where this process may."""
        for pid in models(self._family) if can_gather() else ():
            gather(pid)

    def cpu(self) -> float:
        """CPU seconds that the engine's processes have used so far."""
        return cpu_seconds(self._process.pid)

    def answer(self) -> Any:
        """The next message; a sentence ends the benchmark."""
        try:
            answer = self._connection.recv()
        except EOFError:
            raise SystemExit(f"the engine {self.name} ended; its own log above says why") from None
        if isinstance(answer, str):
            raise SystemExit(f"{self.name}: {answer}")
        return answer


def allocator() -> str | None:
    """tcmalloc, which vLLM's documentation has one preload on a CPU (Debian's libtcmalloc-minimal4); None where there is none."""
    return ctypes.util.find_library("tcmalloc_minimal")


@contextmanager
def start(name: str) -> Iterator[Engine]:
    """An engine that is starting; its first `answer` says that it is ready."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    before = dict(os.environ)
    if name in PLUGINS:
        os.environ["VLLM_PLUGINS"] = PLUGINS[name]
    if malloc := allocator():
        os.environ["LD_PRELOAD"] = os.pathsep.join(filter(None, (malloc, os.environ.get("LD_PRELOAD"))))
    if name == "vllm-lens":
        os.environ["PYTHONPATH"] = os.pathsep.join([str(LENS_FOLDER.resolve()), os.environ.get("PYTHONPATH", "")])
    process = context.Process(target=_serve, args=(theirs, name), name=name)
    process.start()
    os.environ.clear()
    os.environ.update(before)
    theirs.close()
    engine = Engine(name, ours, process)
    try:
        yield engine
    finally:
        # Killed: asked to end, vLLM's processes take minutes, and a worker outlives one that was terminated, polling for ever.
        for pid in (*descendants(process.pid or 0), process.pid or 0):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.join()
        ours.close()


def _serve(connection: "Connection[Any, Any]", name: str) -> None:
    if name == "vllm-lens":
        sys.path.insert(0, str(LENS_FOLDER.resolve()))
    try:
        run = _transformers() if name == "transformers" else _vllm(name)
        connection.send(0)
        while True:
            connection.send(tuple(run(connection.recv())))
    except EOFError:
        return
    except Exception as e:  # noqa: BLE001 — told to the benchmark, which ends.
        import traceback

        traceback.print_exc()
        connection.send(f"{type(e).__name__}: {e}")


def vllm(*, steers: bool) -> Any:
    """The engine of all cells; one that steers is proven, with every bundle loaded."""
    from vllm import LLM

    from trimtab.server.engine.bundles import register_bundle
    from trimtab.server.engine.handshake import prove_llm
    from trimtab.server.engine.plugin import registered

    # Statistics are on, as in a server, for they time the first token.
    llm = LLM(
        str(model_path()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=64,
        disable_log_stats=False,
    )
    if registered() != steers:
        raise RuntimeError("trimtab's plugin is loaded where it should not be, or the other way round")
    if steers:
        prove_llm(llm, [register_bundle(llm, bundle) for bundle in all_bundles().values()])
    return llm


def sampling(cell: Cell, extras: list[Any]) -> list[Any]:
    """The parameters of a cell's requests, each with its extra arguments."""
    from vllm import SamplingParams

    return [
        SamplingParams(temperature=0, max_tokens=cell.n_tokens, ignore_eos=True, extra_args=extra) for extra in extras
    ]


def _vllm(name: str) -> Any:
    steers = name.startswith("trimtab")
    llm = vllm(steers=steers)
    part_cores()
    run_engine = llm._run_engine

    def _run_engine(*args: Any, **kwargs: Any) -> Any:
        llm.wake_up(tags=["scheduling"])
        return run_engine(*args, **kwargs)

    # All requests of a run are in its first step: one that the engine takes before the others are there costs a step more.
    llm._run_engine = _run_engine

    def run(ask: Ask) -> Took:
        condition, cell = CONDITIONS[ask.condition], ask.cell
        plans = [None if condition.edit is None else plan(condition.edit, ask.which(i)) for i in range(cell.n)]
        extras: list[Any] = [None] * cell.n
        if condition.edit is not None and steers:
            extras = [{KEY: wanted.wire()} for wanted in plans if wanted is not None]
        elif condition.edit is not None:
            extras = [_lens(condition.edit, ask.which(i)) for i in range(cell.n)]
        params = sampling(cell, extras)
        asked: Any = [{"prompt_token_ids": ids} for ids in ask.prompts]
        llm.sleep(level=0)
        clocks = Clocks()
        outputs = llm.generate(asked, params, use_tqdm=False)
        seconds, worker, total = clocks.read()
        for wanted, output in zip(plans, outputs, strict=True):
            if steers:
                carried = (output.kv_transfer_params or {}).get(KEY)
                if wanted is not None:
                    proof.verify(wanted, carried, cell.n_prompt, [cell.n_tokens])
                elif carried is not None:
                    raise RuntimeError("an unsteered request carries a proof")
        first = sorted(o.metrics.first_token_latency for o in outputs if o.metrics)
        tokens = [list(output.outputs[0].token_ids) for output in outputs] if ask.strong else None
        return Took(seconds, worker, total, first[len(first) // 2] if first else None, tokens)

    return run


def _lens(edit: str, which: int) -> dict[str, Any]:
    """The same edit for vllm-lens: a steering vector, or a hook where it has no vector for it."""
    import torch
    from vllm_lens import Hook, SteeringVector  # type: ignore[import-not-found]

    amount = 0.5 + which / 64
    layers = range(N_LAYERS) if edit == "add30" else [LAYER]
    rows = {layer: torch.from_numpy(all_bundles()[f"l{layer}"].decoder) for layer in layers}
    if edit.startswith("add"):
        activations = torch.stack([rows[layer][0] for layer in layers])
        return {
            "apply_steering_vectors": [
                SteeringVector(activations=activations, layer_indices=list(layers), scale=amount)
            ]
        }
    d_KD = rows[LAYER][:N_LATENTS]

    def clamp(context: Any, h: Any) -> Any:
        return h + (amount - torch.relu(h @ d_KD.T)) @ d_KD

    return {"apply_hooks": [Hook(fn=clamp, layer_indices=[LAYER])]}


def _transformers() -> Any:
    """A loop over a static batch with forward hooks: what one writes without a serving engine."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model = loaded.eval()

    def hook(edit: str, layer: int, ask: Ask) -> Any:
        d_KD = torch.from_numpy(all_bundles()[f"l{layer}"].decoder)
        amount_B = torch.tensor([0.5 + ask.which(i) / 64 for i in range(ask.cell.n)])
        add_B1D = amount_B[:, None, None] * d_KD[0]

        def added(_: Any, __: Any, output: Any) -> Any:
            return (output[0] + add_B1D, *output[1:]) if isinstance(output, tuple) else output + add_B1D

        def clamped(_: Any, __: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            edited = h + (amount_B[:, None, None] - torch.relu(h @ d_KD.T)) @ d_KD
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return model.model.layers[layer].register_forward_hook(clamped if edit == "clamp8" else added)

    @torch.inference_mode()
    def run(ask: Ask) -> Took:
        condition, cell = CONDITIONS[ask.condition], ask.cell
        assert model.config.hidden_size == D_MODEL
        layers = {None: (), "add30": range(N_LAYERS)}.get(condition.edit, (LAYER,))
        handles = [hook(condition.edit or "", layer, ask) for layer in layers]
        ids = torch.tensor(ask.prompts)
        clocks = Clocks()
        cache, first, said = None, None, []
        for _ in range(cell.n_tokens):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            said.append(ids)
            first = first or time.perf_counter() - clocks.start
        seconds, worker, total = clocks.read()
        for handle in handles:
            handle.remove()
        return Took(seconds, worker, total, first, torch.cat(said, 1).tolist() if ask.strong else None)

    return run
