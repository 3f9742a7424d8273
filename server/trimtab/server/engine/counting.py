"""What the proofs of a worker's requests count: request by request, or, where a batch decodes on, all of it at once.

Axes: L layers, N edited rows of a step, P requests, K of `proof.COUNTS`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.server.engine.device_path import Found
from trimtab.server.engine.onward import Watch
from trimtab.server.engine.proof import COUNTS, GATE, SPECIAL, Report, Together
from trimtab.server.plan import Segment

__all__ = ["CACHED", "Block", "Count", "Group", "Request", "fail", "tally"]

_PROMPT, _COMPLETION, CACHED, _GATE, _SPECIAL = range(len(COUNTS))
_FLAGS = ((_GATE, GATE), (_SPECIAL, SPECIAL))


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
    block: "Block | None" = None
    """The last one that counted it: its arrays are a part of the block's."""

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


class Count(NamedTuple):
    """What a span adds to its request's counts once it has been applied."""

    request: Request
    again: int
    """Of its rows, the first ones that were counted before a preemption."""
    prompt: int
    completion: int
    drafts: range
    """Positions of its last rows that are drafts and not counted before."""


class Group(NamedTuple):
    """Layers that edit the same spans."""

    layers: tuple[int, ...]
    members: tuple[int, ...]
    """Which of the step's spans."""
    ends: NDArray[np.int64]
    """Where the rows of each member end among the group's edited rows."""

    def read(self, found: Found) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None] | int:
        """‖Δ‖/‖h‖ [L, N] and the rows' flags, if any row is conditional; or a layer whose operator did not run."""
        ratios = [found.ratios[layer] for layer in self.layers]
        told = [ratio_N for ratio_N in ratios if ratio_N is not None]
        if len(told) < len(ratios):
            return next(layer for layer, ratio_N in zip(self.layers, ratios, strict=True) if ratio_N is None)
        ratio_LN = np.stack(told) if len(told) > 1 else told[0][None]
        if (ratio_LN < 0).any():
            return self.layers[int((ratio_LN < 0).any(axis=1).argmax())]
        flags_LN = None
        if any(layer in found.flags for layer in self.layers):
            none_N = np.zeros(ratio_LN.shape[1], np.uint8)
            flags_LN = np.stack([found.flags.get(layer, none_N) for layer in self.layers])
        return ratio_LN, flags_LN


class Block:
    """Requests that decode together, a row each, and are edited at one group's layers alone: their counts are one array, to
    which a step adds at once. That ends for all when one of them is counted in another block."""

    def __init__(self, layers: tuple[int, ...], requests: Sequence[tuple[str, Request]]) -> None:
        self._layers = layers
        self._ids = tuple(request_id for request_id, _ in requests)
        self._requests = [request for _, request in requests]
        self._plans = tuple(request.plan_hash for request in self._requests)
        self._is_whole = True
        self.counts_PKL = np.stack([request.counts_KL for request in self._requests])
        self.norms_P2L = np.stack([request.norms_2L for request in self._requests])
        for i, request in enumerate(self._requests):
            if request.block is not None:
                request.block._is_whole = False
            request.block, request.counts_KL, request.norms_2L = self, self.counts_PKL[i], self.norms_P2L[i]

    @staticmethod
    def of(group: Group, requests: Sequence[tuple[str, Request]]) -> "Block | None":
        """Of a group's requests; None where one of them has other layers too, which another group counts."""
        return Block(group.layers, requests) if all(r.layers == group.layers for _, r in requests) else None

    def add(self, ratio_LN: NDArray[np.float32], flags_LN: NDArray[np.uint8] | None) -> bool:
        """Count one completion token of each request; False, and nothing, where `tally` is wanted: a row is not finite, or the
        block is no longer whole."""
        if not self._is_whole or not np.isfinite(ratio_LN).all():
            return False
        self.counts_PKL[:, _COMPLETION] += 1
        largest_PL, sums_PL = self.norms_P2L[:, 0], self.norms_P2L[:, 1]
        np.maximum(largest_PL, ratio_LN.T, out=largest_PL)
        sums_PL += ratio_LN.T
        if flags_LN is not None:
            for kind, flag in _FLAGS:
                self.counts_PKL[:, kind] += (flags_LN.T & flag) > 0
        return True

    def report(self) -> Together | None:
        """What was applied to all of them so far; None where each is to report for itself."""
        if not self._is_whole or any(request.failure is not None for request in self._requests):
            return None
        return Together(self._ids, self._plans, self._layers, self.counts_PKL.tobytes(), self.norms_P2L.tobytes())


def tally(
    group: Group, counts: Sequence[Count], ratio_LN: NDArray[np.float32], flags_LN: NDArray[np.uint8] | None
) -> None:
    """Count what a step did at the layers of a group."""
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
            fail(lost, f"the edit of layer {layer} gave NaN or infinity; lower its strength")
    for count, largest_L, sums_L in zip(counts, largest_LP.T, sums_LP.T, strict=True):
        request, at = count.request, count.request.at(group.layers)
        if count.prompt:
            request.counts_KL[_PROMPT, at] += count.prompt
        request.counts_KL[_COMPLETION, at] += count.completion
        request.norms_2L[0, at] = np.maximum(request.norms_2L[0, at], largest_L)
        request.norms_2L[1, at] += sums_L
    if flags_LN is not None:
        for kind, flag in _FLAGS:
            found_LP = np.add.reduceat(flags_LN & flag > 0, starts, axis=1, dtype=np.int32)
            for count, found_L in zip(counts, found_LP.T, strict=True):
                count.request.counts_KL[kind, count.request.at(group.layers)] += found_L


def fail(counts: Iterable[Count], why: str) -> None:
    """The requests of these spans fail, unless they have already."""
    for count in counts:
        count.request.failure = count.request.failure or why
