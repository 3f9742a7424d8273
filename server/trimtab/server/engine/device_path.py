"""The edit as it must be inside a CUDA graph: no choice on the host, only fixed shapes and persistent buffers.

    s_T  = row_slot[:T]                                          slot 0 is the unedited row
    Δ_TD = Σ_k (α[s, k] + β[s, k] φ(e_i · h + b_i)) d_i          with i = place[s, k], a row of the pool

The host writes row_slot before the forward, and a slot's rows of the tables when the slot is first used; a replayed graph reads
them. ‖Δ‖/‖h‖ of each edited row goes to a buffer that the host clears to −1 first, so a graph that was captured without the
operator is seen at once: its rows are never counted, and the reply fails closed.

Computed by one Triton kernel (`kernel`), or where Triton cannot run by torch ops, which are its oracle too. `armed` says whether
the operator launches anything: a step without edits launches nothing, and `graphs` captures each CUDA graph both ways.

Axes: T rows of the step, padding included, D d_model, L hooked layers, S slots, K rows of the formula in a slot, P in the pool.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.attribution.edit import Rows
from trimtab.server.engine.tables import SlotRows
from trimtab.server.engine.work import Piece
from trimtab.server.plan import PlanRow

__all__ = ["MAX_ROWS", "DevicePath", "Span", "to_host"]

MAX_ROWS = 64
"""Rows of the formula that a request can have at one position and hook point."""
POOL = 4096
_CHUNK = 4


class Span(NamedTuple):
    """Rows [start, stop) of the step's batch under one segment."""

    key: str
    slot: dict[int, SlotRows]
    start: int
    stop: int


class DevicePath:
    """The persistent buffers of one worker.

    `row` gives a plan's row as one row of the formula, on the device.
    """

    def __init__(
        self,
        layers: Sequence[int],
        d_model: int,
        n_slots: int,
        n_rows: int,
        device: torch.device,
        row: Callable[[PlanRow], Rows],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def table(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        n_layers, self._row = len(layers), row
        self._index = {layer: i for i, layer in enumerate(layers)}
        self.row_slot_T = table(n_rows, dtype=torch.int32)
        self.count_LS, self.reads_LS = table(2, n_layers, n_slots + 1, dtype=torch.int32)
        self.place_LSK = table(n_layers, n_slots + 1, MAX_ROWS, dtype=torch.int32)
        self.alpha_LSK, self.beta_LSK = table(2, n_layers, n_slots + 1, MAX_ROWS)
        self.e_PD, self.d_PD = table(2, POOL, d_model)
        self.b_P, self.theta_P = table(2, POOL)
        self.ratio_LT = table(n_layers, n_rows).fill_(-1.0)
        self.capturing: bool | None = None
        """While a CUDA graph is captured: whether the operator launches into it."""
        self._edited: frozenset[int] = frozenset()
        self._free = list(range(n_slots, 0, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._pool: dict[tuple[str, str, int], int] = {}
        self._wanted: set[tuple[str, str, int]] = set()
        self._wanted_keys: set[str] = set()
        self.computed_by: Literal["torch", "triton"] = "torch"
        self._launch: Callable[[int, Tensor, Tensor | None], None] = self._torch
        if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            from trimtab.server.engine import kernel  # an engine on the CPU needs no Triton

            buffers = kernel.Buffers(**{name: getattr(self, name) for name in kernel.Buffers._fields})
            kernel.warm(buffers, dtype)
            self.computed_by = "triton"
            self._launch = lambda i, hidden, residual: kernel.launch(buffers, i, hidden, residual)

    @property
    def armed(self) -> bool:
        """Whether the next forward edits something."""
        return bool(self._edited) if self.capturing is None else self.capturing

    def forget(self) -> None:
        """Drop every slot and the pool: a bundle was unloaded, or the pool is full."""
        self._free += self._slots.values()
        self._slots.clear()
        self._pool.clear()

    def write(self, spans: Sequence[Span]) -> None:
        """Before a forward: the slot of every row, and the tables of slots that are new."""
        wanted, self._wanted, self._wanted_keys = self._wanted, set(), set()
        if not spans and not self._edited:
            return
        self._edited = frozenset(layer for span in spans for layer in span.slot)
        if len(self._pool.keys() | wanted) >= POOL:
            self.forget()
        self._wanted = set()
        used = {span.key for span in spans}
        # All of the buffer is written: a captured batch may be padded beyond the step's own rows.
        staging_T = torch.zeros(len(self.row_slot_T), dtype=torch.int32, pin_memory=self.row_slot_T.is_cuda)
        for span in spans:
            staging_T[span.start : span.stop] = self._slot(span, used)
        self.row_slot_T.copy_(staging_T, non_blocking=True)
        self.ratio_LT.fill_(-1.0)

    def apply(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """The operator's body on the device; `hidden` is edited in place."""
        if not self.armed or (self.capturing is None and layer not in self._edited):
            return
        if hidden.shape[1] != self.e_PD.shape[1] or len(hidden) > len(self.row_slot_T) or hidden.stride(1) != 1:
            raise ValueError(
                f"a stream of shape {tuple(hidden.shape)} and strides {hidden.stride()} is not what was hooked"
            )
        self._launch(self._index[layer], hidden, residual)

    def _torch(self, i: int, hidden: Tensor, residual: Tensor | None) -> None:
        """What the kernel does, in torch ops that can be captured; every row of the batch is computed."""
        n = len(hidden)
        slot_T = self.row_slot_T[:n]
        h_TD = hidden.float() if residual is None else hidden.float() + residual.float()
        delta_TD = torch.zeros_like(h_TD)
        place_TK, alpha_TK, beta_TK = (
            table_LSK[i].index_select(0, slot_T) for table_LSK in (self.place_LSK, self.alpha_LSK, self.beta_LSK)
        )
        for k in range(0, MAX_ROWS, _CHUNK):
            place_TC, alpha_TC, beta_TC = (x[:, k : k + _CHUNK] for x in (place_TK, alpha_TK, beta_TK))
            x_TC = torch.einsum("td,tcd->tc", h_TD, self.e_PD[place_TC]) + self.b_P[place_TC]
            phi_TC = torch.where(x_TC > self.theta_P[place_TC], x_TC, 0.0)
            delta_TD += torch.einsum("tc,tcd->td", alpha_TC + beta_TC * phi_TC, self.d_PD[place_TC])
        ratio_T = delta_TD.norm(dim=-1) / h_TD.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.ratio_LT[i, :n] = torch.where(slot_T > 0, ratio_T, -1.0)
        hidden.copy_(torch.where(slot_T.unsqueeze(1) > 0, (hidden.float() + delta_TD).to(hidden.dtype), hidden))

    def ratios(self, pieces: Mapping[int, Sequence[Piece]]) -> Callable[[], dict[int, NDArray[np.float32]]]:
        """Start copying ‖Δ‖/‖h‖ of the edited rows to the host; the result, by layer, waits for it."""
        if not pieces:
            return dict
        n = max(piece.stop for found in pieces.values() for piece in found)
        copy = to_host(self.ratio_LT[:, :n].clone())  # the next step clears the buffer

        def gather() -> dict[int, NDArray[np.float32]]:
            ratio_LT = copy().numpy()
            return {
                layer: np.concatenate([ratio_LT[self._index[layer], p.start : p.stop] for p in found])
                for layer, found in pieces.items()
            }

        return gather

    def _slot(self, span: Span, used: set[str]) -> int:
        """The slot of a span, written if it is new; one that no row of this step uses makes room."""
        slot = self._slots.get(span.key)
        if slot is None:
            if not self._free:
                oldest = next(key for key in self._slots if key not in used)
                self._free.append(self._slots.pop(oldest))
            slot = self._slots[span.key] = self._free.pop()
            self._fill(slot, span.slot)
        self._slots.move_to_end(span.key)
        return slot

    def _fill(self, slot: int, by_layer: dict[int, SlotRows]) -> None:
        """A slot's rows of the tables, at every layer."""
        count_L, reads_L = torch.zeros(2, len(self._index), dtype=torch.int32)
        place_LK = torch.zeros(len(self._index), MAX_ROWS, dtype=torch.int32)
        alpha_LK, beta_LK = torch.zeros(2, len(self._index), MAX_ROWS)
        for layer, slot_rows in by_layer.items():
            i, rows = self._index[layer], sorted(slot_rows.rows, key=lambda row: not row.beta)
            count_L[i], reads_L[i] = len(rows), sum(bool(row.beta) for row in rows)
            for k, row in enumerate(rows):
                place_LK[i, k], alpha_LK[i, k], beta_LK[i, k] = self._place(row), row.alpha, row.beta
        tables = (self.count_LS, self.reads_LS, self.place_LSK, self.alpha_LSK, self.beta_LSK)
        for table, host in zip(tables, (count_L, reads_L, place_LK, alpha_LK, beta_LK), strict=True):
            # Pinned, so that a new plan does not wait for the forward that is under way.
            table[:, slot].copy_(host.pin_memory() if table.is_cuda else host, non_blocking=True)

    def _place(self, row: PlanRow) -> int:
        """Where in the pool a plan's row is, written if it is new; place 0 is never used."""
        name = (row.bundle, row.source, row.row)
        place = self._pool.get(name)
        if place is None:
            place = self._pool[name] = len(self._pool) + 1
            rows = self._row(row)
            self.e_PD[place], self.d_PD[place] = rows.e_KD[0], rows.d_KD[0]
            self.b_P[place], self.theta_P[place] = rows.b_K[0], rows.theta_K[0]
        return place

    def misfit(self, key: str, slot: dict[int, SlotRows]) -> str | None:
        """Why a slot does not fit beside those of this step that were asked for before it; None when it does."""
        if any(row.is_conditional for rows in slot.values() for row in rows.rows):
            return "gates and `exclude_special` do not run in CUDA graphs yet"
        most = max((len(rows.rows) for rows in slot.values()), default=0)
        if most > MAX_ROWS:
            return f"the plan has {most} rows at one hook point; with CUDA graphs at most {MAX_ROWS} fit"
        names = {(row.bundle, row.source, row.row) for rows in slot.values() for row in rows.rows}
        if len(self._wanted_keys | {key}) >= self.count_LS.shape[1] or len(self._wanted | names) >= POOL:
            return "the requests of one step hold more different edits than the tables fit; send fewer at once"
        self._wanted_keys.add(key)
        self._wanted |= names
        return None


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host; the result waits for it, and for nothing that was launched later."""
    if not x.is_cuda:
        return lambda: x
    host = x.to("cpu", non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait
