"""The edit as it must be inside a CUDA graph: no choice on the host, only fixed shapes and persistent buffers.

    s_T  = row_slot[:T]                                     slot 0 is the unedited row
    Δ_TD = add[s] + Σ_k β[s, k] φ(e_i · h + b_i) d_i        with i = latent[s, k], a row of the pool

The host writes row_slot before the forward, and a slot's rows of the tables when the slot is first used; a replayed graph reads
them. ‖Δ‖/‖h‖ of each edited row goes to a buffer that the host clears to −1 first, so a graph that was captured without the
operator is seen at once: its rows are never counted, and the reply fails closed. Plain torch ops, capturable. Tested against
the reference on the CPU; NOT yet run on a GPU, where every hooked layer computes on every row of every step until a fused
kernel and an inactive variant of each graph exist. Until then restrict the hooked layers: `--additional-config '{"trimtab":
{"layers": [14]}}'`.

Axes: T rows of the step, padding included, D d_model, S slots, K latents of a slot, P latents in the pool, L hooked layers.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.server.engine.tables import SlotRows
from trimtab.server.engine.work import Piece

__all__ = ["MAX_LATENTS", "DevicePath", "Span", "to_host"]

MAX_LATENTS = 16
"""Latents whose activation a request can read at one position and hook point."""
POOL = 4096
_CHUNK = 4


class Span(NamedTuple):
    """Rows [start, stop) of the step's batch under one segment."""

    key: str
    slot: dict[int, SlotRows]
    start: int
    stop: int


class DevicePath:
    """The persistent buffers of one worker."""

    def __init__(self, layers: Sequence[int], d_model: int, n_slots: int, n_rows: int, device: torch.device) -> None:
        shape = (len(layers), n_slots + 1, MAX_LATENTS)
        self._index = {layer: i for i, layer in enumerate(layers)}
        self.row_slot_T = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self.add_LSD = torch.zeros(*shape[:2], d_model, device=device)
        self.latent_LSK = torch.zeros(shape, dtype=torch.int64, device=device)
        self.beta_LSK = torch.zeros(shape, device=device)
        self.e_PD, self.d_PD = torch.zeros(2, POOL, d_model, device=device)
        self.b_P, self.theta_P = torch.zeros(2, POOL, device=device)
        self.ratio_LT = torch.full((len(layers), n_rows), -1.0, device=device)
        self._free = list(range(n_slots, 0, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._pool: dict[tuple[str, str, int], int] = {}
        self._dirty = False

    def forget(self) -> None:
        """Drop every slot and the pool: a bundle was unloaded."""
        self._free += self._slots.values()
        self._slots.clear()
        self._pool.clear()

    def write(self, spans: Sequence[Span]) -> None:
        """Before a forward: the slot of every row, and the tables of slots that are new."""
        if not spans and not self._dirty:
            return
        self._dirty = bool(spans)
        used = {span.key for span in spans}
        # All of the buffer is written: a captured batch may be padded beyond the step's own rows.
        staging_T = torch.zeros(len(self.row_slot_T), dtype=torch.int64, pin_memory=self.row_slot_T.is_cuda)
        for span in spans:
            staging_T[span.start : span.stop] = self._slot(span, used)
        self.row_slot_T.copy_(staging_T, non_blocking=True)
        self.ratio_LT.fill_(-1.0)

    def apply(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """The operator's body on the device; `hidden` is edited in place."""
        i, n = self._index[layer], len(hidden)
        slot_T = self.row_slot_T[:n]
        h_TD = hidden.float() if residual is None else hidden.float() + residual.float()
        delta_TD = self.add_LSD[i].index_select(0, slot_T)
        latent_TK, beta_TK = self.latent_LSK[i].index_select(0, slot_T), self.beta_LSK[i].index_select(0, slot_T)
        for k in range(0, MAX_LATENTS, _CHUNK):
            row_TC = latent_TK[:, k : k + _CHUNK]
            x_TC = torch.einsum("td,tcd->tc", h_TD, self.e_PD[row_TC]) + self.b_P[row_TC]
            phi_TC = torch.where(x_TC > self.theta_P[row_TC], x_TC, 0.0)
            delta_TD += torch.einsum("tc,tcd->td", beta_TK[:, k : k + _CHUNK] * phi_TC, self.d_PD[row_TC])
        ratio_T = delta_TD.norm(dim=-1) / h_TD.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.ratio_LT[i, :n] = torch.where(slot_T > 0, ratio_T, -1.0)
        hidden.copy_(torch.where(slot_T.unsqueeze(1) > 0, (hidden.float() + delta_TD).to(hidden.dtype), hidden))

    def ratios(self, pieces: Mapping[int, Sequence[Piece]]) -> Callable[[], dict[int, NDArray[np.float32]]]:
        """Start copying ‖Δ‖/‖h‖ of the edited rows to the host; the result, by layer, waits for it."""
        if not pieces:
            return dict
        n_rows = max(piece.stop for found in pieces.values() for piece in found)
        copy = to_host(self.ratio_LT[[self._index[layer] for layer in pieces], :n_rows])

        def gather() -> dict[int, NDArray[np.float32]]:
            rows = zip(pieces.items(), copy().numpy(), strict=True)
            return {
                layer: np.concatenate([ratio_T[p.start : p.stop] for p in found]) for (layer, found), ratio_T in rows
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
        self.add_LSD[:, slot] = 0.0
        self.beta_LSK[:, slot] = 0.0
        for layer, rows in by_layer.items():
            i = self._index[layer]
            if rows.add_D is not None:
                self.add_LSD[i, slot] = rows.add_D
            if rows.latents is not None:
                k = len(rows.names)
                places = torch.tensor([self._place(rows, j) for j in range(k)], device=self.latent_LSK.device)
                self.latent_LSK[i, slot, :k] = places
                self.beta_LSK[i, slot, :k] = rows.latents.beta_K

    def _place(self, rows: SlotRows, j: int) -> int:
        """The pool's row of a slot's j-th latent, written if it is new; row 0 is never used by one."""
        place = self._pool.get(rows.names[j])
        if place is None and rows.latents is not None:
            place = self._pool[rows.names[j]] = len(self._pool) + 1
            latents = rows.latents
            self.e_PD[place], self.d_PD[place] = latents.e_KD[j], latents.d_KD[j]
            self.b_P[place], self.theta_P[place] = latents.b_K[j], latents.theta_K[j]
        return place or 0

    def misfit(self, slot: dict[int, SlotRows]) -> str | None:
        """Why a slot does not fit the buffers; None when it does."""
        most = max((len(rows.names) for rows in slot.values()), default=0)
        if most > MAX_LATENTS:
            return f"the plan reads {most} latents at one hook point; with CUDA graphs at most {MAX_LATENTS} fit"
        if len(self._pool) + sum(len(rows.names) for rows in slot.values()) >= POOL:
            return f"more than {POOL} different latents are in use; unload bundles, or start with --enforce-eager"
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
