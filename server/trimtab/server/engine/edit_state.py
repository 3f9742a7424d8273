"""A worker's requests, and what each step has to edit and count.

    arrive ─► prepare ─► (forward: run on each hooked layer) ─► collect ─► … ─► finish

Nothing here raises into vLLM: an exception in a worker ends the engine for everybody. What cannot be applied is recorded on the
request as a failure, travels with its proof, and the reply fails closed.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.server.engine.conditional import Tokens
from trimtab.server.engine.counting import CACHED, Block, Count, Group, Request, fail, tally
from trimtab.server.engine.device_path import DevicePath, Found, to_host
from trimtab.server.engine.device_slots import Span
from trimtab.server.engine.onward import Onward, Watch
from trimtab.server.engine.op import Hooks
from trimtab.server.engine.probe import Probes
from trimtab.server.engine.proof import Reports, Together
from trimtab.server.engine.steady import Steady
from trimtab.server.engine.tables import SlotRows, Tables
from trimtab.server.engine.wire import decode, segments, stop
from trimtab.server.engine.work import LayerWork, Norms, Piece, Where
from trimtab.server.errors import InvalidSteering

__all__ = ["EditState"]

_log = logging.getLogger(__name__)


@dataclass
class _Layer:
    """One hooked layer."""

    calls: int = 0
    work: LayerWork | None = None
    """None: nothing to edit in this step, or a `DevicePath` does it."""
    norms: Norms | None = None
    """Of the edited rows; None until the operator has run in this step."""


class _Layout(NamedTuple):
    """What a step does at each layer, reused while the batch stays the same: a decode step moves positions, not rows."""

    spans: tuple[Span, ...] = ()
    """They keep their slots alive, so that equal ids are equal slots."""
    key: tuple[tuple[int, ...], ...] = ()
    """(id of the slot, first row, last row, the request's entries of `Onward`) of each span."""
    pieces: Mapping[int, tuple[Piece, ...]] = MappingProxyType({})
    works: Mapping[int, LayerWork] = MappingProxyType({})
    """Empty with a `DevicePath`."""
    groups: tuple[Group, ...] = ()
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
            Group(tuple(layers), found, np.cumsum([spans[i].stop - spans[i].start for i in found]))
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
        self.hooks: Hooks | None = None
        """To leave on the layers that a step needs; None where a compiler or a graph keeps them."""
        self.speaks = True
        """Whether the scheduler reads the output of this rank."""
        self.token_ids: Tensor | None = None
        """The buffer that the model reads its tokens from; the runner's adapter sets it."""
        self.special_V: Tensor | None = None
        """Whether each token of the vocabulary is special; None when the engine has no tokenizer."""
        self.layers = {layer: _Layer() for layer in layers}
        self.probes = Probes(tables, layers)
        self._requests: dict[str, Request] = {}
        self._step: Sequence[tuple[str, Request]] = ()
        self._counts: Sequence[Count] = ()
        """Of the spans of this step."""
        self._steady: Steady | None = None
        """What the last step was, or may be followed by."""
        self._blocks: Sequence[Block | None] = ()
        """Of this step's groups, if it is a steady one."""
        self._active = False
        self._at_rest = False
        """The last step prepared nothing and left no hook."""
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

    @property
    def rests(self) -> bool:
        """Whether `prepare` has nothing to do: no request is steered or probed, and neither was one in the last step."""
        return self._at_rest and not self._requests and not self.probes.running

    def arrive(self, request_id: str, wire: Any, n_prompt: int) -> None:
        """A request with a plan is scheduled for the first time in this worker."""
        if request_id in self._requests and self._requests[request_id].n_prompt == n_prompt:
            return
        self._forget(request_id)
        self._steady = None
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
            self._steady = None
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
        """The next forward, which warms up or proves that the hooks are called, edits and reads nothing."""
        self._nothing()
        if self.hooks is not None:
            self.hooks.everywhere()

    def _nothing(self) -> None:
        self._at_rest = False
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
        self._step = self._counts = self._blocks = ()
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
        if self.rests:
            return
        if self._requests:
            self._reset()
        else:
            self._nothing()
        self.probes.prepare(request_ids, starts, lengths)
        if self._requests:
            try:
                self._prepare(request_ids, starts, lengths, drafts)
            except Exception as e:  # noqa: BLE001 - told to every steered request of the step through its proof
                _log.exception("trimtab: a step could not be prepared")
                step = [(r, self._requests[r]) for r in request_ids if r in self._requests]
                self._nothing()
                self._step = step
                for _, request in step:
                    request.failure = f"the step could not be prepared: {type(e).__name__}: {e}"
        if self.hooks is not None:
            edited = self.layout.pieces.keys() if self._active else frozenset[int]()
            self.hooks.only(edited | self.probes.step.keys())
        self._at_rest = not self._step and not self.probes.step

    def _prepare(
        self, request_ids: Sequence[str], starts: Sequence[int], lengths: Sequence[int], drafts: Mapping[str, int]
    ) -> None:
        steady = self._steady
        if steady is not None and steady.goes_on(request_ids, starts, lengths, drafts):
            self._step, self._counts, self._blocks = steady.step, steady.counts, steady.blocks
        else:
            self._find(request_ids, starts, lengths, drafts)
            groups = self.layout.groups if self._counts else ()
            self._steady = Steady.after(request_ids, starts, lengths, self._step, groups, self._counts)
        self._active = bool(self._counts)
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

    def _find(
        self, request_ids: Sequence[str], starts: Sequence[int], lengths: Sequence[int], drafts: Mapping[str, int]
    ) -> None:
        """The step's requests, their spans and the layout of these."""
        step: list[tuple[str, Request]] = []
        spans: list[tuple[Span, Count]] = []
        row = 0
        for request_id, first, n in zip(request_ids, starts, lengths, strict=True):
            request = self._requests.get(request_id)
            if request is not None:
                step.append((request_id, request))
                spans += self._spans(request, first, first + n, row - first, drafts.get(request_id, 0))
            row += n
        key = tuple((id(span.slot), span.start, span.stop, *count.request.entries.values()) for span, count in spans)
        if key != self.layout.key:
            device = self.tables.device if self.path is None else None
            self.layout = _Layout.of(
                tuple(span for span, _ in spans), key, [count.request for _, count in spans], device
            )
        self._step, self._counts = step, [count for _, count in spans]

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

    def _spans(self, request: Request, start: int, end: int, offset: int, n_drafts: int) -> list[tuple[Span, Count]]:
        """What to edit in positions [start, end), which are rows [start + offset, end + offset); the last ones are drafts."""
        request.settle(start)
        known, sure = request.high_water, end - n_drafts
        request.high_water, request.drafted = max(known, sure), end
        found: list[tuple[Span, Count]] = []
        if request.failure is not None:
            return found
        for segment in request.segments:
            if start > known and (skipped := min(stop(segment), start) - max(segment.lo, known)) > 0:
                if segment.is_onward:
                    request.failure = (
                        "a gate that stays open was not read on positions that came out of the prefix cache"
                    )
                    return []
                request.counts_KL[CACHED, request.at(tuple(sorted({row.layer for row in segment.rows})))] += skipped
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
            count = Count(request, again, prompt, max(0, hi - new) - len(guessed) - prompt, guessed)
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
                    fail((self._counts[i] for i in group.members), why)

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

    def collect(self) -> Callable[[], Reports]:
        """After a forward: what gives the reports on the step's steered requests once the device is done; `Reports` itself when
        there are none."""
        if not self._step:
            return Reports
        step, counts, blocks = self._step, self._counts, self._blocks
        layout = self.layout if self._active else _Layout()
        if self.path is not None:
            wait = self.path.found(layout.pieces, flags=layout.is_conditional)
        else:
            wait = _found(layout.groups, {layer: self.layers[layer].norms for layer in layout.pieces})
        self._reset()

        def reports() -> Reports:
            found = wait()
            together: list[Together] = []
            for group, block in zip_longest(layout.groups, blocks):
                read = group.read(found)
                members = [counts[i] for i in group.members]
                if isinstance(read, int):
                    fail(members, f"the hook of layer {read} was not called in a step that needed it")
                elif block is None or not block.add(*read):
                    tally(group, members, *read)
                elif (some := block.report()) is not None:
                    together.append(some)
            told = {request_id for some in together for request_id in some.requests}
            return Reports({r: request.report() for r, request in step if r not in told}, tuple(together))

        return reports


def _found(groups: Sequence[Group], norms: Mapping[int, Norms | None]) -> Callable[[], Found]:
    """Start copying what the step's work found to the host; the result waits for it."""
    copies: list[tuple[list[int], Callable[[], Tensor]]] = []
    flags: dict[int, Callable[[], Tensor]] = {}
    for group in groups:
        ran = {layer: found for layer in group.layers if (found := norms[layer]) is not None}
        if ran:
            copies.append((list(ran), to_host(Norms.ratios(list(ran.values())))))
        flags |= {layer: to_host(found.flags_N) for layer, found in ran.items() if found.flags_N is not None}

    def by_layer() -> Found:
        ratios: dict[int, NDArray[np.float32] | None] = dict.fromkeys(norms)
        for layers, copy in copies:
            ratios |= zip(layers, copy().numpy(), strict=True)
        return Found(ratios, {layer: wait().numpy() for layer, wait in flags.items()})

    return by_layer
