"""A worker's requests, and what each step has to edit and count.

    arrive ─► prepare ─► (forward: run on each hooked layer) ─► collect ─► … ─► finish

Nothing here raises into vLLM: an exception in a worker ends the engine for everybody. What cannot be applied is recorded on the
request as a failure, travels with its proof, and the reply fails closed.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trimtab.server.engine.device_path import DevicePath, Span, to_host
from trimtab.server.engine.tables import Tables
from trimtab.server.engine.wire import decode, segments, stop
from trimtab.server.engine.work import LayerWork, Piece, key
from trimtab.server.errors import InvalidSteering
from trimtab.server.plan import Segment

__all__ = ["EditState", "Request", "Tally"]

_log = logging.getLogger(__name__)


@dataclass
class Tally:
    """Tokens of one request at one hook point, each position counted once."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    max_relative_norm: float = 0.0


@dataclass
class Request:
    """One steered request in this worker."""

    plan_hash: str
    n_prompt: int
    segments: tuple[Segment, ...]
    tallies: dict[int, Tally]
    """By layer; every layer of the plan."""
    high_water: int = 0
    """Positions below were run or came out of the cache: recomputing them after a preemption counts nothing."""
    failure: str | None = None
    drafted: int = 0
    """Positions below were run in the last step, drafts of speculative decoding included."""
    drafts: list[tuple[int, int, float]] = field(default_factory=list)
    """(layer, position, ‖Δ‖/‖h‖) of the last step's edited drafts, which count once they are accepted."""

    def settle(self, start: int) -> None:
        """Count the drafts that were accepted: those below the first position of the request's next step."""
        for layer, position, norm in self.drafts:
            if position < start:
                tally = self.tallies[layer]
                tally.completion += 1
                tally.max_relative_norm = max(tally.max_relative_norm, norm)
        self.drafts.clear()
        self.high_water = max(self.high_water, min(start, self.drafted))

    def proof(self) -> dict[str, Any]:
        """What was applied so far, as `proof` tells it."""
        return {
            "plan": self.plan_hash,
            "samples": 1,
            "failure": self.failure,
            "hook_points": {
                f"blocks.{layer}.resid_post": {
                    "prompt_tokens": tally.prompt,
                    "completion_tokens": tally.completion,
                    "cached_prompt_tokens": tally.cached,
                    "max_relative_norm": tally.max_relative_norm,
                }
                for layer, tally in self.tallies.items()
            },
            "drafts": [(f"blocks.{layer}.resid_post", at, norm) for layer, at, norm in self.drafts],
        }


class _Count(NamedTuple):
    """What a piece adds to its request's tally once it has been applied."""

    request: Request
    prompt: int
    completion: int
    drafts: range
    """Positions of its last rows that are drafts and not counted before."""


@dataclass
class _Layer:
    """One hooked layer."""

    calls: int = 0
    pieces: tuple[Piece, ...] = ()
    """What this step edits."""
    counts: list[_Count] = field(default_factory=list)
    work: LayerWork | None = None
    """None: nothing to edit in this step."""
    ratio_N: Tensor | None = None
    """‖Δ‖/‖h‖ of the edited rows; None until the operator has run in this step."""
    last: LayerWork | None = None
    """The previous step's work, reused while the batch stays the same."""


class EditState:
    """Everything the operator and the runner adapters share in one worker.

    With a `DevicePath` the operator decides nothing on the host, as a CUDA graph needs; without one it runs the `LayerWork`.
    """

    def __init__(self, layers: Sequence[int], tables: Tables, path: DevicePath | None = None) -> None:
        self.tables = tables
        self.path = path
        self.layers = {layer: _Layer() for layer in layers}
        self._requests: dict[str, Request] = {}
        self._step: list[tuple[str, Request]] = []
        self._active: list[int] = []

    @property
    def n_requests(self) -> int:
        """Steered requests in flight."""
        return len(self._requests)

    @property
    def n_slots(self) -> int:
        """Different segments of steered requests in flight."""
        return len({segment.key for request in self._requests.values() for segment in request.segments})

    def arrive(self, request_id: str, wire: Any, n_prompt: int) -> None:
        """A request with a plan is scheduled for the first time in this worker."""
        if request_id in self._requests and self._requests[request_id].n_prompt == n_prompt:
            return
        try:
            plan = decode(wire)
        except (InvalidSteering, TypeError) as e:
            self._requests[request_id] = Request("", n_prompt, (), {}, failure=f"the worker cannot read the plan ({e})")
            return
        tallies = {layer: Tally() for layer in plan.layers}
        request = Request(plan.hash, n_prompt, segments(wire, n_prompt), tallies)
        unhooked = [layer for layer in plan.layers if layer not in self.layers]
        if unhooked:
            request.failure = f"layer {unhooked[0]} is not hooked in this worker; it hooks {sorted(self.layers)}"
        self._requests[request_id] = request

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests, however they ended."""
        if self._requests:
            for request_id in request_ids:
                self._requests.pop(request_id, None)

    def unload(self, content_hash: str) -> bool:
        """Whether the bundle was dropped; False while a live request's plan names it."""
        if any(r.bundle == content_hash for q in self._requests.values() for s in q.segments for r in s.rows):
            return False
        self.tables.unload(content_hash)
        if self.path is not None:
            self.path.forget()
        return True

    def idle(self) -> None:
        """The next forward edits nothing."""
        self._reset()
        if self.path is not None:
            self.path.write(())

    def _reset(self) -> None:
        for layer in self._active:
            state = self.layers[layer]
            state.work, state.ratio_N, state.pieces, state.counts = None, None, (), []
        self._active = []
        self._step = []

    def prepare(
        self,
        request_ids: Sequence[str],
        starts: Sequence[int],
        lengths: Sequence[int],
        drafts: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Before a forward: request i runs positions [starts[i], starts[i] + lengths[i]), its rows following those of i − 1.

        The last `drafts[i]` of them are guesses of speculative decoding: edited like the others, counted if they are accepted.
        """
        self._reset()
        if not self._requests:
            self.idle()
            return
        try:
            self._prepare(request_ids, starts, lengths, drafts)
        except Exception as e:  # noqa: BLE001 - told to every steered request of the step through its proof
            _log.exception("trimtab: a step could not be prepared")
            step = [(r, self._requests[r]) for r in request_ids if r in self._requests]
            self.idle()
            self._step = step
            for _, request in step:
                request.failure = f"the step could not be prepared: {type(e).__name__}: {e}"

    def _prepare(
        self, request_ids: Sequence[str], starts: Sequence[int], lengths: Sequence[int], drafts: Mapping[str, int]
    ) -> None:
        spans: list[tuple[Span, _Count]] = []
        row = 0
        for request_id, first, n in zip(request_ids, starts, lengths, strict=True):
            request = self._requests.get(request_id)
            if request is not None:
                self._step.append((request_id, request))
                spans += self._spans(request, first, first + n, row - first, drafts.get(request_id, 0))
            row += n
        if self.path is not None:
            self.path.write([span for span, _ in spans])
        pieces: dict[int, list[Piece]] = {}
        for span, count in spans:
            for layer, rows in span.slot.items():
                pieces.setdefault(layer, []).append(Piece(rows, span.start, span.stop))
                self.layers[layer].counts.append(count)
        self._active = list(pieces)
        for layer, found in pieces.items():
            state = self.layers[layer]
            state.pieces = tuple(found)
            if self.path is None:
                if state.last is None or state.last.key != key(found):
                    state.last = LayerWork(found, self.tables.device)
                state.work = state.last

    def _spans(self, request: Request, start: int, end: int, offset: int, n_drafts: int) -> list[tuple[Span, _Count]]:
        """What to edit in positions [start, end), which are rows [start + offset, end + offset); the last ones are drafts."""
        request.settle(start)
        known, sure = request.high_water, end - n_drafts
        request.high_water, request.drafted = max(known, sure), end
        found: list[tuple[Span, _Count]] = []
        if request.failure is not None:
            return found
        for segment in request.segments:
            if start > known and (skipped := min(stop(segment), start) - max(segment.lo, known)) > 0:
                for layer in {row.layer for row in segment.rows}:
                    request.tallies[layer].cached += skipped
            lo, hi = max(segment.lo, start), min(stop(segment), end)
            if lo >= hi:
                continue
            try:
                slot = self.tables.slot(segment)
            except KeyError as e:
                request.failure = f"bundle {e.args[0]} is not loaded in this worker"
                return []
            request.failure = self.path.misfit(segment.key, slot) if self.path is not None else None
            if request.failure is not None:
                return []
            new = max(lo, known)
            prompt = max(0, min(hi, request.n_prompt - 1) - new)
            guessed = range(max(new, sure), hi)
            count = _Count(request, prompt, max(0, hi - new) - len(guessed) - prompt, guessed)
            found.append((Span(segment.key, slot, lo + offset, hi + offset), count))
        return found

    def run(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """The operator's body: edit this layer's rows of this step, if any."""
        state = self.layers[layer]
        state.calls += 1
        if self.path is None and state.work is None:
            return
        try:
            if self.path is not None:
                self.path.apply(layer, hidden, residual)
            elif state.work is not None:
                state.ratio_N = state.work.apply(hidden, residual)
        except Exception as e:  # noqa: BLE001 - told to every request of this layer through its proof
            _log.exception("trimtab: the edit of layer %d failed", layer)
            for count in state.counts:
                count.request.failure = f"the edit of layer {layer} raised {type(e).__name__}: {e}"

    def collect(self) -> Callable[[], dict[str, dict[str, Any]]]:
        """After a forward: what gives the proofs of the step's steered requests once the device is done."""
        if not self._step:
            return dict
        step = self._step
        done = [(layer, self.layers[layer].pieces, self.layers[layer].counts) for layer in self._active]
        ratios: Callable[[], Mapping[int, NDArray[np.float32] | None]]
        if self.path is not None:
            ratios = self.path.ratios({layer: pieces for layer, pieces, _ in done})
        else:
            waiting = {layer: _to_host(self.layers[layer].ratio_N) for layer in self._active}
            ratios = lambda: {layer: wait() for layer, wait in waiting.items()}  # noqa: E731
        self._reset()

        def proofs() -> dict[str, dict[str, Any]]:
            found = ratios()
            for layer, pieces, counts in done:
                _tally(layer, pieces, counts, found[layer])
            return {request_id: request.proof() for request_id, request in step}

        return proofs


def _tally(layer: int, pieces: Sequence[Piece], counts: list[_Count], ratio_N: NDArray[np.float32] | None) -> None:
    if ratio_N is None or (ratio_N < 0).any():
        for count in counts:
            count.request.failure = (
                count.request.failure or f"the hook of layer {layer} was not called in a step that needed it"
            )
        return
    ends = np.cumsum([piece.stop - piece.start for piece in pieces])
    starts = np.concatenate([[0], ends[:-1]])
    for count, end in zip(counts, ends.tolist(), strict=True):
        if n := len(count.drafts):
            norms = ratio_N[end - n : end].tolist()
            count.request.drafts += [(layer, at, norm) for at, norm in zip(count.drafts, norms, strict=True)]
            ratio_N[end - n : end] = np.where(np.isfinite(norms), 0.0, norms)  # NaN fails the request, accepted or not
    largest = np.maximum.reduceat(ratio_N, starts).tolist()
    for count, norm in zip(counts, largest, strict=True):
        tally = count.request.tallies[layer]
        if not math.isfinite(norm):
            count.request.failure = f"the edit of layer {layer} gave NaN or infinity; lower its strength"
            continue
        tally.prompt += count.prompt
        tally.completion += count.completion
        tally.max_relative_norm = max(tally.max_relative_norm, norm)


def _to_host(ratio_N: Tensor | None) -> Callable[[], NDArray[np.float32] | None]:
    """Start copying to the host; the result waits for it."""
    if ratio_N is None:
        return lambda: None
    copy = to_host(ratio_N)
    return lambda: copy().numpy()
