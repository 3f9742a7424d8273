"""The slots of the persistent buffers: which of them hold what, written when a slot is first used.

A slot is one segment of a plan at every hooked layer; the pool holds each different latent once, whatever slots use it. Slots
that no row of a step uses make room for new ones; a full pool is begun afresh. A segment with gates that stay open is a slot for
each request, because what it reads is the request's own.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from trimtab.attribution.edit import Rows
from trimtab.server.engine.buffers import MAX_ROWS, SHAPE, Buffers
from trimtab.server.engine.onward import Watch
from trimtab.server.engine.tables import SlotRows
from trimtab.server.plan import PlanRow

__all__ = ["DeviceSlots", "Span"]

_Name = tuple[str, str, int]
"""(content hash, source, row) of what is in the pool."""


class Span(NamedTuple):
    """Rows [start, stop) of the step's batch under one segment."""

    key: str
    """Of the segment."""
    slot: dict[int, SlotRows]
    start: int
    stop: int
    entries: Mapping[Watch, int] = MappingProxyType({})
    """The request's, in `Onward`; empty unless a row of the segment is gated so."""

    @property
    def name(self) -> tuple[str | int, ...]:
        """Spans of one name do the same."""
        return (self.key, *self.entries.values())


class DeviceSlots:
    """What is in `buffers`; `row` gives a plan's row as one row of the formula, on the device."""

    def __init__(self, layers: Mapping[int, int], buffers: Buffers, row: Callable[[PlanRow], Rows]) -> None:
        self._index, self._buffers, self._row = layers, buffers, row
        self._free = list(range(buffers.shape_LSC.shape[1] - 1, 0, -1))
        self._slots: OrderedDict[tuple[str | int, ...], int] = OrderedDict()
        self._pool: dict[_Name, int] = {}
        self._wanted: set[_Name] = set()
        self._wanted_slots: set[tuple[str | int, ...]] = set()

    def misfit(self, span: Span) -> str | None:
        """Why a span does not fit beside those of this step that were asked for before it; None when it does."""
        most = max((len(rows.rows) for rows in span.slot.values()), default=0)
        if most > MAX_ROWS:
            return f"the plan has {most} rows at one hook point; with CUDA graphs at most {MAX_ROWS} fit"
        names = {name for rows in span.slot.values() for row in rows.rows for name in _names(row)}
        n_slots, n_pool = self._buffers.shape_LSC.shape[1], len(self._buffers.e_PD)
        if len(self._wanted_slots | {span.name}) >= n_slots or len(self._wanted | names) >= n_pool:
            return "the requests of one step hold more different edits than the tables fit; send fewer at once"
        self._wanted_slots.add(span.name)
        self._wanted |= names
        return None

    def forget(self) -> None:
        """Drop every slot and the pool: a bundle was unloaded, or the pool is full."""
        self._free += self._slots.values()
        self._slots.clear()
        self._pool.clear()

    def take(self, spans: Sequence[Span]) -> list[int]:
        """The slot of each span of a step, written if it is new."""
        wanted, self._wanted, self._wanted_slots = self._wanted, set(), set()
        if len(self._pool.keys() | wanted) >= len(self._buffers.e_PD):
            self.forget()
        used = {span.name for span in spans}
        return [self._slot(span, used) for span in spans]

    def _slot(self, span: Span, used: set[tuple[str | int, ...]]) -> int:
        slot = self._slots.get(span.name)
        if slot is None:
            if not self._free:
                oldest = next(name for name in self._slots if name not in used)
                self._free.append(self._slots.pop(oldest))
            slot = self._slots[span.name] = self._free.pop()
            self._fill(slot, span)
        self._slots.move_to_end(span.name)
        return slot

    def _fill(self, slot: int, span: Span) -> None:
        """A slot's rows of the tables, at every layer."""
        n_layers = len(self._index)
        shape_LC = torch.zeros(n_layers, SHAPE.WIDTH, dtype=torch.int32)
        place_LK, gate_LK, entry_LK = torch.zeros(3, n_layers, MAX_ROWS, dtype=torch.int32)
        alpha_LK, beta_LK, above_LK = torch.zeros(3, n_layers, MAX_ROWS)
        excludes_LK = torch.zeros(n_layers, MAX_ROWS, dtype=torch.int8)
        for layer, slot_rows in span.slot.items():
            i, rows = self._index[layer], sorted(slot_rows.rows, key=_kind)
            kinds = [_kind(row) for row in rows]
            shape_LC[i, SHAPE.ROWS] = len(rows)
            shape_LC[i, SHAPE.READS] = sum(kind <= 1 for kind in kinds)
            shape_LC[i, SHAPE.GATES_LO] = sum(kind < 1 for kind in kinds)
            shape_LC[i, SHAPE.GATES_HI] = sum(kind <= 2 for kind in kinds)
            shape_LC[i, SHAPE.ONWARD] = sum(row.is_onward for row in rows)
            shape_LC[i, SHAPE.EXCLUDES] = sum(row.exclude_special for row in rows)
            for k, row in enumerate(rows):
                place_LK[i, k], alpha_LK[i, k], beta_LK[i, k] = self._place(row), row.alpha, row.beta
                excludes_LK[i, k] = row.exclude_special
                if row.gate is not None:
                    gate_LK[i, k], above_LK[i, k] = self._place(_reader(row)), row.gate.above
                if (watch := Watch.of(row)) is not None:
                    entry_LK[i, k] = span.entries[watch]
        b = self._buffers
        for table, host in (
            (b.shape_LSC, shape_LC),
            (b.place_LSK, place_LK),
            (b.alpha_LSK, alpha_LK),
            (b.beta_LSK, beta_LK),
            (b.gate_LSK, gate_LK),
            (b.above_LSK, above_LK),
            (b.entry_LSK, entry_LK),
            (b.excludes_LSK, excludes_LK),
        ):
            # Pinned, so that a new plan does not wait for the forward that is under way.
            table[:, slot].copy_(host.pin_memory() if table.is_cuda else host, non_blocking=True)

    def _place(self, row: PlanRow) -> int:
        """Where in the pool a plan's row is, written if it is new; place 0 is never used."""
        name = (row.bundle, row.source, row.row)
        place = self._pool.get(name)
        if place is None:
            place = self._pool[name] = len(self._pool) + 1
            rows, b = self._row(row), self._buffers
            b.e_PD[place], b.d_PD[place] = rows.e_KD[0], rows.d_KD[0]
            b.b_P[place], b.theta_P[place] = rows.b_K[0], rows.theta_K[0]
        return place


def _kind(row: PlanRow) -> int:
    """The order of rows in a slot."""
    return (0 if row.gate is None else 1) if row.beta else (3 if row.gate is None else 2)


def _reader(row: PlanRow) -> PlanRow:
    """The latent that a row's gate reads, as a row."""
    if row.gate is None:
        raise ValueError("the row has no gate")
    return row._replace(bundle=row.gate.bundle, source="latent", row=row.gate.row)


def _names(row: PlanRow) -> tuple[_Name, ...]:
    """What a row takes in the pool."""
    own = (row.bundle, row.source, row.row)
    return (own,) if row.gate is None else (own, (row.gate.bundle, "latent", row.gate.row))
