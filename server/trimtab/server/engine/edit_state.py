"""A worker's requests, and what each step has to edit and count.

    arrive ─► prepare ─► (forward: run on each hooked layer) ─► collect ─► … ─► finish

Nothing here raises into vLLM: an exception in a worker ends the engine for everybody. What cannot be applied is recorded on the
request as a failure, travels with its proof, and the reply fails closed.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.server.engine.conditional import Tokens
from trimtab.server.engine.device_path import DevicePath, Found, to_host
from trimtab.server.engine.device_slots import Span
from trimtab.server.engine.onward import Onward, Watch
from trimtab.server.engine.probe import Probes
from trimtab.server.engine.proof import COUNTS, GATE, SPECIAL, Report
from trimtab.server.engine.tables import SlotRows, Tables
from trimtab.server.engine.wire import decode, segments, stop
from trimtab.server.engine.work import LayerWork, Norms, Piece, Where
from trimtab.server.errors import InvalidSteering
from trimtab.server.plan import Segment

__all__ = ["EditState", "Request"]

_log = logging.getLogger(__name__)


_PROMPT, _COMPLETION, _CACHED, _GATE, _SPECIAL = range(len(COUNTS))


@dataclass
class Request:
    """One steered request in this worker."""

    plan_hash: str
    n_prompt: int
    segments: tuple[Segment, ...]
    layers: tuple[int, ...]
    """Of the plan, those that this worker owns, ascending."""
    entries: dict[Watch, int] = field(default_factory=dict)
    """In `Onward`."""
    high_water: int = 0
    """Positions below were run or came out of the cache: recomputing them after a preemption counts nothing."""
    failure: str | None = None
    drafted: int = 0
    """Positions below were run in the last step, drafts of speculative decoding included."""
    drafts: list[tuple[int, int, float, int]] = field(default_factory=list)
    """(layer, position, ‖Δ‖/‖h‖, flags) of the last step's edited drafts, which count once they are accepted."""

    def __post_init__(self) -> None:
        self.counts_KL = np.zeros((len(COUNTS), len(self.layers)), np.int32)
        """A proof's counts at each layer, each position counted once."""
        self.norms_2L = np.zeros((2, len(self.layers)))
        """Largest and summed ‖Δ‖/‖h‖ at each layer."""
        self._at: dict[tuple[int, ...], slice | list[int]] = {self.layers: slice(None)}

    def at(self, layers: tuple[int, ...]) -> slice | list[int]:
        """Where these layers are in the arrays."""
        found = self._at.get(layers)
        if found is None:
            found = self._at[layers] = [self.layers.index(layer) for layer in layers]
        return found

    def settle(self, start: int) -> None:
        """Count the drafts that were accepted: those below the first position of the request's next step."""
        for layer, position, norm, flags in self.drafts:
            if position < start:
                i = self.layers.index(layer)
                self.counts_KL[:, i] += (0, 1, 0, bool(flags & GATE), bool(flags & SPECIAL))
                self.norms_2L[:, i] = max(self.norms_2L[0, i], norm), self.norms_2L[1, i] + norm
        self.drafts.clear()
        self.high_water = max(self.high_water, min(start, self.drafted))

    def report(self) -> Report:
        """What was applied so far."""
        counts, norms = self.counts_KL.tobytes(), self.norms_2L.tobytes()
        return Report(self.plan_hash, self.failure, self.layers, counts, norms, tuple(self.drafts))


class _Count(NamedTuple):
    """What a span adds to its request's counts once it has been applied."""

    request: Request
    again: int
    """Of its rows, the first ones that were counted before a preemption."""
    prompt: int
    completion: int
    drafts: range
    """Positions of its last rows that are drafts and not counted before."""


@dataclass
class _Layer:
    """One hooked layer."""

    calls: int = 0
    work: LayerWork | None = None
    """None: nothing to edit in this step, or a `DevicePath` does it."""
    norms: Norms | None = None
    """Of the edited rows; None until the operator has run in this step."""


class _Group(NamedTuple):
    """Layers that edit the same spans."""

    layers: tuple[int, ...]
    members: tuple[int, ...]
    """Which of the step's spans."""
    ends: NDArray[np.int64]
    """Where the rows of each member end among the group's edited rows."""


class _Layout(NamedTuple):
    """What a step does at each layer, reused while the batch stays the same: a decode step moves positions, not rows."""

    spans: tuple[Span, ...] = ()
    """They keep their slots alive, so that equal ids are equal slots."""
    key: tuple[tuple[int, ...], ...] = ()
    """(id of the slot, first row, last row, the request's entries of `Onward`) of each span."""
    pieces: Mapping[int, tuple[Piece, ...]] = MappingProxyType({})
    works: Mapping[int, LayerWork] = MappingProxyType({})
    """Empty with a `DevicePath`."""
    groups: tuple[_Group, ...] = ()
    is_conditional: bool = False

    @staticmethod
    def of(
        spans: tuple[Span, ...],
        key: tuple[tuple[int, ...], ...],
        requests: Sequence[Request],
        device: torch.device | None,
    ) -> "_Layout":
        members: dict[int, list[int]] = {}
        for i, span in enumerate(spans):
            for layer in span.slot:
                members.setdefault(layer, []).append(i)
        pieces = {
            layer: tuple(
                Piece(rows := spans[i].slot[layer], spans[i].start, spans[i].stop, _entries(rows, requests[i]))
                for i in found
            )
            for layer, found in members.items()
        }
        alike: dict[tuple[int, ...], list[int]] = {}
        for layer, found in sorted(members.items()):
            alike.setdefault(tuple(found), []).append(layer)
        groups = tuple(
            _Group(tuple(layers), found, np.cumsum([spans[i].stop - spans[i].start for i in found]))
            for found, layers in alike.items()
        )
        works: dict[int, LayerWork] = {}
        if device is not None:
            for group in groups:
                where = Where.of(pieces[group.layers[0]], device)
                works |= {layer: LayerWork(pieces[layer], device, where) for layer in group.layers}
        is_conditional = any(rows.is_conditional for span in spans for rows in span.slot.values())
        return _Layout(spans, key, pieces, works, groups, is_conditional)


def _entries(rows: SlotRows, request: Request) -> tuple[int, ...]:
    """The request's entries of `Onward` for a slot's conditional rows; empty when none is gated so."""
    watches = rows.conditional.watches if rows.conditional is not None else ()
    return tuple(request.entries[watch] if watch else 0 for watch in watches) if any(watches) else ()


class EditState:
    """Everything the operator and the runner adapters share in one worker.

    With a `DevicePath` the operator decides nothing on the host, as a CUDA graph needs; without one it runs the `LayerWork`.
    """

    def __init__(
        self, layers: Sequence[int], tables: Tables, path: DevicePath | None = None, elsewhere: Sequence[int] = ()
    ) -> None:
        self.tables = tables
        self.path = path
        self.elsewhere = frozenset(elsewhere)
        """Steerable layers of other pipeline stages, whose edits those make."""
        self.speaks = True
        """Whether the scheduler reads the output of this rank."""
        self.token_ids: Tensor | None = None
        """The buffer that the model reads its tokens from; the runner's adapter sets it."""
        self.special_V: Tensor | None = None
        """Whether each token of the vocabulary is special; None when the engine has no tokenizer."""
        self.layers = {layer: _Layer() for layer in layers}
        self.probes = Probes(tables, layers)
        self._requests: dict[str, Request] = {}
        self._step: list[tuple[str, Request]] = []
        self._counts: list[_Count] = []
        """Of the spans of this step."""
        self._active = False
        self.layout = _Layout()
        """Of the last step that edited something."""
        self._onward = Onward(tables.device) if path is None else path.onward
        self._position_T: Tensor | None = None
        self._tokens: Tokens | None = None
        """Of this step's rows, from the first layer with conditional rows on."""

    @property
    def n_requests(self) -> int:
        """Steered requests in flight."""
        return len(self._requests)

    @property
    def n_slots(self) -> int:
        """Different segments of steered requests in flight."""
        return len({segment.key for request in self._requests.values() for segment in request.segments})

    @property
    def n_gates(self) -> int:
        """Gates that stay open, of steered requests in flight."""
        return self._onward.n_taken

    def arrive(self, request_id: str, wire: Any, n_prompt: int) -> None:
        """A request with a plan is scheduled for the first time in this worker."""
        if request_id in self._requests and self._requests[request_id].n_prompt == n_prompt:
            return
        self._forget(request_id)
        try:
            plan = decode(wire)
        except (InvalidSteering, TypeError) as e:
            self._requests[request_id] = Request("", n_prompt, (), (), failure=f"the worker cannot read the plan ({e})")
            return
        layers = tuple(layer for layer in plan.layers if layer in self.layers)
        request = Request(plan.hash, n_prompt, segments(wire, n_prompt, only=layers), layers)
        unhooked = [layer for layer in plan.layers if layer not in self.layers and layer not in self.elsewhere]
        if unhooked:
            request.failure = f"layer {unhooked[0]} is not hooked in this worker; it hooks {sorted(self.layers)}"
        rows = [row for row in plan.rows if row.layer in layers]
        if self.special_V is None and any(row.exclude_special for row in rows):
            request.failure = "this worker has no tokenizer to know special tokens by"
        try:
            request.entries = self._onward.take({watch for row in rows if (watch := Watch.of(row))})
        except LookupError as e:
            request.failure = str(e)
        self._requests[request_id] = request

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests, however they ended."""
        self.probes.finish(request_ids)
        if self._requests:
            for request_id in request_ids:
                self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._onward.give(request.entries.values())

    def unload(self, content_hash: str) -> bool:
        """Whether the bundle was dropped; False while a live request's plan names it."""
        rows = (row for request in self._requests.values() for segment in request.segments for row in segment.rows)
        if any(content_hash in (row.bundle, row.gate and row.gate.bundle) for row in rows):
            return False
        self.tables.unload(content_hash)
        if self.path is not None:
            self.path.slots.forget()
        return True

    def idle(self) -> None:
        """The next forward edits and reads nothing."""
        self._reset()
        self.probes.step = {}
        if self.path is not None:
            self.path.write(())

    def _reset(self) -> None:
        if self._active:
            for layer in self.layout.pieces:
                state = self.layers[layer]
                state.work, state.norms = None, None
        self._active = False
        self._counts = []
        self._step = []
        self._position_T = self._tokens = None

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
        self.probes.prepare(request_ids, starts, lengths)
        if not self._requests:
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
        key = tuple((id(span.slot), span.start, span.stop, *count.request.entries.values()) for span, count in spans)
        if key != self.layout.key:
            device = self.tables.device if self.path is None else None
            self.layout = _Layout.of(
                tuple(span for span, _ in spans), key, [count.request for _, count in spans], device
            )
        self._counts = [count for _, count in spans]
        self._active = bool(spans)
        for layer, work in self.layout.works.items():
            self.layers[layer].work = work
        positions = np.zeros(0, np.int64)
        watching: set[int] = set()
        if self.layout.is_conditional:
            runs = [np.arange(first, first + n) for first, n in zip(starts, lengths, strict=True)]
            positions, watching = np.concatenate(runs), self._watch(starts, lengths, request_ids)
        if self.path is not None:
            self.path.write(self.layout.spans, positions, watching)
        elif self.layout.is_conditional:
            self._position_T = torch.from_numpy(positions).to(self.tables.device)

    def _watch(self, starts: Sequence[int], lengths: Sequence[int], request_ids: Sequence[str]) -> set[int]:
        """Before a forward with conditional rows: gates that opened in what is computed again have not opened; the layers of
        those whose request runs several tokens."""
        entries: list[int] = []
        since: list[int] = []
        layers: set[int] = set()
        for request_id, first, n in zip(request_ids, starts, lengths, strict=True):
            if (request := self._requests.get(request_id)) is not None and request.entries:
                entries += request.entries.values()
                since += [first] * len(request.entries)
                layers |= {watch.layer for watch in request.entries} if n > 1 else set()
        if entries:
            self._onward.forget(entries, since)
        return layers

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
                if segment.is_onward:
                    request.failure = (
                        "a gate that stays open was not read on positions that came out of the prefix cache"
                    )
                    return []
                request.counts_KL[_CACHED, request.at(tuple(sorted({row.layer for row in segment.rows})))] += skipped
            lo, hi = max(segment.lo, start), min(stop(segment), end)
            if lo >= hi:
                continue
            try:
                slot = self.tables.slot(segment)
            except KeyError as e:
                request.failure = f"bundle {e.args[0]} is not loaded in this worker"
                return []
            entries = request.entries if request.entries and segment.is_onward else {}
            span = Span(segment.key, slot, lo + offset, hi + offset, entries)
            request.failure = self.path.slots.misfit(span) if self.path is not None else None
            if request.failure is not None:
                return []
            new = max(lo, known)
            prompt = max(0, min(hi, request.n_prompt - 1) - new)
            guessed = range(max(new, sure), hi)
            again = max(0, min(new, hi) - lo)
            count = _Count(request, again, prompt, max(0, hi - new) - len(guessed) - prompt, guessed)
            found.append((span, count))
        return found

    def run(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """The operator's body: edit this layer's rows of this step, if any."""
        state = self.layers[layer]
        state.calls += 1
        if layer in self.probes.step:
            self.probes.read(layer, hidden, residual)
        if self.path is None and state.work is None:
            return
        try:
            if self.path is not None:
                self.path.apply(layer, hidden, residual)
            elif state.work is not None:
                tokens = self._read_tokens() if state.work.is_conditional else None
                state.norms = state.work.apply(hidden, residual, tokens, self._onward)
        except Exception as e:  # noqa: BLE001 - told to every request of this layer through its proof
            _log.exception("trimtab: the edit of layer %d failed", layer)
            why = f"the edit of layer {layer} raised {type(e).__name__}: {e}"
            for group in self.layout.groups:
                if layer in group.layers:
                    _fail((self._counts[i] for i in group.members), why)

    def _read_tokens(self) -> Tokens:
        """The step's tokens, read in the forward itself: with asynchronous scheduling the host does not know them yet."""
        if self._tokens is None:
            position_T = self._position_T
            if position_T is None:
                raise RuntimeError("the step has conditional rows and was not prepared for them")
            special_T = torch.zeros(len(position_T), dtype=torch.bool, device=position_T.device)
            if self.special_V is not None and self.token_ids is not None:
                ids_T = self.token_ids[: len(position_T)].long()
                special_T = self.special_V[ids_T.clamp(0, len(self.special_V) - 1)]
            self._tokens = Tokens(special_T, position_T)
        return self._tokens

    def collect(self) -> Callable[[], dict[str, Report]]:
        """After a forward: what gives the reports on the step's steered requests once the device is done."""
        if not self._step:
            return dict
        step, counts = self._step, self._counts
        layout = self.layout if self._active else _Layout()
        if self.path is not None:
            wait = self.path.found(layout.pieces, flags=layout.is_conditional)
        else:
            wait = _found({layer: self.layers[layer].norms for layer in layout.pieces})
        self._reset()

        def reports() -> dict[str, Report]:
            found = wait()
            for group in layout.groups:
                members = [counts[i] for i in group.members]
                _tally(group, members, found)
            return {request_id: request.report() for request_id, request in step}

        return reports


def _tally(
    group: _Group,
    counts: Sequence[_Count],
    found: Found,
) -> None:
    """Count what a step did at the layers of a group."""
    ratios = [found.ratios[layer] for layer in group.layers]
    ran = [ratio_N for ratio_N in ratios if ratio_N is not None and not (ratio_N < 0).any()]
    if len(ran) < len(ratios):
        silent = next(layer for layer, r in zip(group.layers, ratios, strict=True) if r is None or (r < 0).any())
        _fail(counts, f"the hook of layer {silent} was not called in a step that needed it")
        return
    ratio_LN = np.stack(ran)
    flags_LN = None
    if any(layer in found.flags for layer in group.layers):
        none_N = np.zeros(ratio_LN.shape[1], np.uint8)
        flags_LN = np.stack([found.flags.get(layer, none_N) for layer in group.layers])
    ends = group.ends.tolist()
    starts = np.concatenate([[0], group.ends[:-1]])
    for count, start, end in zip(counts, starts.tolist(), ends, strict=True):
        if n := len(count.drafts):
            norms_LM = ratio_LN[:, end - n : end].tolist()
            flags_LM = [[0] * n] * len(group.layers) if flags_LN is None else flags_LN[:, end - n : end].tolist()
            for layer, norms, flags in zip(group.layers, norms_LM, flags_LM, strict=True):
                count.request.drafts += [(layer, *draft) for draft in zip(count.drafts, norms, flags, strict=True)]
        if n or count.again:  # not counted yet, or counted before; NaN fails the request all the same
            for rows in (slice(start, start + count.again), slice(end - n, end)):
                ratio_LN[:, rows][np.isfinite(ratio_LN[:, rows])] = 0.0
                if flags_LN is not None:
                    flags_LN[:, rows] = 0
    one_each = len(ends) == ends[-1]
    largest_LP = ratio_LN if one_each else np.maximum.reduceat(ratio_LN, starts, axis=1)
    sums_LP = ratio_LN if one_each else np.add.reduceat(ratio_LN, starts, axis=1, dtype=np.float64)
    finite_LP = np.isfinite(largest_LP)
    if not finite_LP.all():
        for layer, finite_P in zip(group.layers, finite_LP, strict=True):
            lost = (count for count, finite in zip(counts, finite_P, strict=True) if not finite)
            _fail(lost, f"the edit of layer {layer} gave NaN or infinity; lower its strength")
    for count, largest_L, sums_L in zip(counts, largest_LP.T, sums_LP.T, strict=True):
        request, at = count.request, count.request.at(group.layers)
        if count.prompt:
            request.counts_KL[_PROMPT, at] += count.prompt
        request.counts_KL[_COMPLETION, at] += count.completion
        request.norms_2L[0, at] = np.maximum(request.norms_2L[0, at], largest_L)
        request.norms_2L[1, at] += sums_L
    if flags_LN is not None:
        for kind, flag in ((_GATE, GATE), (_SPECIAL, SPECIAL)):
            found_LP = np.add.reduceat(flags_LN & flag > 0, starts, axis=1, dtype=np.int32)
            for count, found_L in zip(counts, found_LP.T, strict=True):
                count.request.counts_KL[kind, count.request.at(group.layers)] += found_L


def _fail(counts: Iterable[_Count], why: str) -> None:
    for count in counts:
        count.request.failure = count.request.failure or why


def _found(norms: dict[int, Norms | None]) -> Callable[[], Found]:
    """Start copying what the step's work found to the host; the result waits for it."""
    ran = {layer: found for layer, found in norms.items() if found is not None}
    if not ran:
        return lambda: Found(dict.fromkeys(norms), {})
    delta_M, stream_M = (torch.cat(parts) for parts in zip(*(found[:2] for found in ran.values()), strict=True))
    copy = to_host(delta_M / stream_M.clamp_min(torch.finfo(torch.float32).tiny))
    flags = {layer: to_host(found.flags_N) for layer, found in ran.items() if found.flags_N is not None}
    ends = np.cumsum([len(found.stream_N) for found in ran.values()])[:-1]

    def by_layer() -> Found:
        ratios = {**dict.fromkeys(norms), **dict(zip(ran, np.split(copy().numpy(), ends), strict=True))}
        return Found(ratios, {layer: wait().numpy() for layer, wait in flags.items()})

    return by_layer
