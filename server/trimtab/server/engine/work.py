"""The work of one step at one layer: which rows of the batch, which slots, and the arithmetic, batched over both.

    h = hidden (+ residual)            read once, fp32, unedited
    Δ = add[slot] + Σ_k β_k φ(e_k · h + b_k) d_k
    hidden += Δ                        in place, on the edited rows alone

Three ways to take the sum, chosen per step by its shape: one slot (or few latents in all) is a pair of GEMMs with a mask of β;
many slots with few rows each (decode) is a pair of bmm over rows padded per slot; a slot with many rows (prefill) has GEMMs of
its own. Rows that depend on the token they meet come on top, in `conditional`. A work is built on the host when the batch
changes, and reused while it stays the same.

Axes: N edited rows, D d_model, U slots in use, K latents (of all slots, or padded per slot), M padded rows per slot.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import vector_norm

from trimtab.attribution.edit import Rows
from trimtab.server.engine import conditional
from trimtab.server.engine.conditional import Group, Tokens
from trimtab.server.engine.onward import Onward
from trimtab.server.engine.tables import SlotRows

__all__ = ["LayerWork", "Norms", "Piece", "Where"]

DENSE_LATENTS = 256
"""Up to this many latents over all slots, multiplying by zeros is cheaper than padding."""
LONG_ROWS = 16
"""A slot with more rows than this is worth GEMMs of its own."""
FEW = 1 << 17
"""Numbers of a layer's stream that are kept until the forward is over."""
_TINY = torch.finfo(torch.float32).tiny


class Norms(NamedTuple):
    """Of a layer's edited rows, before the edit."""

    delta_N: Tensor
    """‖Δ‖."""
    stream: Tensor
    """‖h‖ [N]; of few rows h itself [N, D], for the norms of all layers are taken at once."""
    flags_N: Tensor | None = None
    """`proof.GATE` and `proof.SPECIAL`; None when no row is conditional."""

    @staticmethod
    def ratios(layers: Sequence["Norms"]) -> Tensor:
        """‖Δ‖/‖h‖ of layers that edit the same rows [L, N]."""
        stream = _stacked([norms.stream for norms in layers])
        stream_LN = vector_norm(stream, dim=-1) if stream.dim() == 3 else stream
        return _stacked([norms.delta_N for norms in layers]) / stream_LN.clamp_min(_TINY)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


class Piece(NamedTuple):
    """Rows [start, stop) of the step's batch, edited by one slot."""

    slot: SlotRows
    start: int
    stop: int
    entries: tuple[int, ...] = ()
    """The request's entries of `Onward`, one for each conditional row of the slot; empty when none is gated so."""


class Where(NamedTuple):
    """Which rows of the batch pieces edit, by which of their slots: the same at every layer that edits the same rows."""

    first: tuple[int, ...]
    """Of each slot, the first piece."""
    of_piece: tuple[int, ...]
    """Which slot each piece has."""
    of_row: NDArray[np.int64]
    """The same of each edited row."""
    span: slice | None
    """The rows, when they follow each other."""
    rows_N: Tensor
    slot_N: Tensor

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device) -> "Where":
        """Where these pieces are; pieces of one slot share it."""
        first: dict[int, int] = {}
        for i, piece in enumerate(pieces):
            first.setdefault(id(piece.slot), i)
        number = {slot: u for u, slot in enumerate(first)}
        of_piece = [number[id(piece.slot)] for piece in pieces]
        of_row = np.repeat(of_piece, [piece.stop - piece.start for piece in pieces])
        contiguous = all(a.stop == b.start for a, b in pairwise(pieces))
        rows = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
        return cls(
            tuple(first.values()),
            tuple(of_piece),
            of_row,
            slice(pieces[0].start, pieces[-1].stop) if contiguous else None,
            torch.from_numpy(rows).to(device),
            torch.from_numpy(of_row).to(device),
        )

    def rows(self, u: int) -> Tensor:
        """The edited rows of slot u."""
        return torch.from_numpy(np.flatnonzero(self.of_row == u))


class LayerWork:
    """All pieces of one layer in one step."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device, where: Where | None = None) -> None:
        self.pieces = tuple(pieces)
        where = where or Where.of(pieces, device)
        slots = [pieces[i].slot for i in where.first]
        counts: list[int] = np.bincount(where.of_row).tolist()
        self._span, self._rows_N, self._slot_N = where.span, where.rows_N, where.slot_N
        self._n_rows = len(where.of_row)
        self._adds = _adds(slots)
        self._one_row_each = len(slots) == self._n_rows
        self._dense: tuple[Rows, Tensor] | None = None
        self._padded: list[_Padded] = []
        self._long: list[tuple[Rows, Tensor]] = []
        reading = [u for u, slot in enumerate(slots) if slot.latents is not None]
        n_latents = sum(len(rows.beta_K) for u in reading if (rows := slots[u].latents) is not None)
        if reading and (len(slots) == 1 or n_latents <= DENSE_LATENTS):
            self._dense = _dense(slots, device)
        elif reading:
            short = [u for u in reading if counts[u] <= LONG_ROWS]
            if short:
                self._padded.append(_Padded.of(slots, short, where, device))
            for u in reading:
                rows = slots[u].latents
                if counts[u] > LONG_ROWS and rows is not None:
                    self._long.append((rows, where.rows(u).to(device)))

        self._groups = _groups(self.pieces, slots, counts, where)
        self._reads = bool(self._dense or self._padded or self._long or self._groups)
        self._fixed: tuple[Tensor, Tensor] | None = None

    @property
    def is_conditional(self) -> bool:
        """Whether `apply` needs the step's tokens."""
        return bool(self._groups)

    @property
    def paths(self) -> tuple[str, ...]:
        """How the latents are summed."""
        ways = (("dense", self._dense), ("padded", self._padded), ("long", self._long), ("conditional", self._groups))
        return tuple(name for name, way in ways if way)

    def apply(
        self, hidden: Tensor, residual: Tensor | None, tokens: Tokens | None = None, onward: Onward | None = None
    ) -> Norms:
        """Edit `hidden` in place; conditional work needs the step's tokens and the worker's `Onward`."""
        part = self._rows(hidden)
        h_ND = part.float()
        if residual is not None:
            h_ND = h_ND + self._rows(residual).float()
        flags_N = None
        if self._groups:
            if tokens is None or onward is None:
                raise ValueError("conditional rows need the step's tokens")
            tokens_N = Tokens(*(of_T.index_select(0, self._rows_N) for of_T in tokens))
            delta_ND = self._sum(h_ND)
            flags_N = conditional.apply(self._groups, delta_ND, h_ND, tokens_N, onward)
            delta_N = vector_norm(delta_ND, dim=-1)
        else:
            delta_ND, delta_N = self._delta(h_ND)
        # Before the edit: without a residual h may be a view of hidden.
        kept = residual is not None and h_ND.numel() <= FEW
        norms = Norms(delta_N, h_ND if kept else vector_norm(h_ND, dim=-1), flags_N)
        if self._span is not None:
            part += delta_ND
        else:
            hidden.index_copy_(0, self._rows_N, (part + delta_ND).to(hidden.dtype))
        return norms

    def _rows(self, x_TD: Tensor) -> Tensor:
        """The edited rows: a view where they follow each other, x itself where they are all."""
        if self._span is None:
            return x_TD.index_select(0, self._rows_N)
        return x_TD if x_TD.size(0) == self._n_rows else x_TD[self._span]

    def _delta(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Δ of the unconditional rows, fp32, from their unedited stream, and its norms; rows may be broadcast."""
        if self._reads:
            delta_ND = self._sum(h_ND)
            return delta_ND, vector_norm(delta_ND, dim=-1)
        if self._fixed is None:  # the same whatever h is, while the batch stays the same
            delta_ND = self._add_rows(h_ND)
            self._fixed = delta_ND, vector_norm(delta_ND, dim=-1).expand(self._n_rows)
        return self._fixed

    def _add_rows(self, h_ND: Tensor) -> Tensor:
        if self._adds is None:
            return torch.zeros_like(h_ND[:1])
        if len(self._adds) == 1 or self._one_row_each:
            return self._adds
        return self._adds.index_select(0, self._slot_N)

    def _sum(self, h_ND: Tensor) -> Tensor:
        delta_ND = self._add_rows(h_ND).expand_as(h_ND).clone()
        if self._dense is not None:
            rows, beta_UK = self._dense
            phi_NK = _phi(torch.addmm(rows.b_K, h_ND, rows.e_KD.T), rows.theta_K)
            beta_NK = beta_UK if len(beta_UK) == 1 else beta_UK.index_select(0, self._slot_N)
            delta_ND.addmm_(beta_NK * phi_NK, rows.d_KD)
        for padded in self._padded:
            padded.accumulate(delta_ND, h_ND)
        for rows, index in self._long:
            phi_NK = _phi(torch.addmm(rows.b_K, h_ND.index_select(0, index), rows.e_KD.T), rows.theta_K)
            delta_ND.index_add_(0, index, (rows.beta_K * phi_NK) @ rows.d_KD)
        return delta_ND


class _Padded(NamedTuple):
    """Slots of few rows each, padded to one shape."""

    index_UM: Tensor
    """Edited rows of each slot; padding points at the extra row N."""
    e_UKD: Tensor
    d_UKD: Tensor
    b_UK: Tensor
    theta_UK: Tensor
    beta_UK: Tensor
    """0 in the padding."""

    @classmethod
    def of(cls, slots: list[SlotRows], chosen: list[int], where: Where, device: torch.device) -> "_Padded":
        rows = [r for u in chosen if (r := slots[u].latents) is not None]
        pad = torch.nn.utils.rnn.pad_sequence
        index = pad([where.rows(u) for u in chosen], batch_first=True, padding_value=len(where.of_row))
        e, d, b, theta, beta = (
            pad([getattr(r, f) for r in rows], batch_first=True) for f in ("e_KD", "d_KD", "b_K", "theta_K", "beta_K")
        )
        return cls(index.to(device), e, d, b, theta, beta)

    def accumulate(self, delta_ND: Tensor, h_ND: Tensor) -> None:
        n, d = h_ND.shape
        h_UMD = torch.cat([h_ND, h_ND.new_zeros(1, d)])[self.index_UM]
        x_UMK = torch.baddbmm(self.b_UK.unsqueeze(1), h_UMD, self.e_UKD.transpose(1, 2))
        phi_UMK = _phi(x_UMK, self.theta_UK.unsqueeze(1))
        delta_UMD = (self.beta_UK.unsqueeze(1) * phi_UMK) @ self.d_UKD
        sums = h_ND.new_zeros(n + 1, d).index_add_(0, self.index_UM.flatten(), delta_UMD.flatten(0, 1))
        delta_ND += sums[:n]


def _groups(pieces: Sequence[Piece], slots: list[SlotRows], counts: list[int], where: Where) -> list[Group]:
    """The conditional rows of all slots: those of few rows together, each of the others by itself."""
    chosen = [u for u, slot in enumerate(slots) if slot.conditional is not None]
    short = [u for u in chosen if counts[u] <= LONG_ROWS]
    groups = []
    for together in ([short] if short else []) + [[u] for u in chosen if counts[u] > LONG_ROWS]:
        index = [where.rows(u) for u in together]
        entries = None
        if any(piece.entries for piece, u in zip(pieces, where.of_piece, strict=True) if u in together):
            entries = [_entries(pieces, where.of_piece, u) for u in together]
        conditionals = [slot for u in together if (slot := slots[u].conditional) is not None]
        groups.append(Group.of(conditionals, index, entries, len(where.of_row)))
    return groups


def _entries(pieces: Sequence[Piece], of_piece: Sequence[int], u: int) -> Tensor:
    """[M, K] entries of a slot's rows; [M, 0] when it has none."""
    mine = [piece for piece, v in zip(pieces, of_piece, strict=True) if v == u]
    return torch.cat([torch.tensor([piece.entries] * (piece.stop - piece.start), dtype=torch.int64) for piece in mine])


def _phi(x: Tensor, theta: Tensor) -> Tensor:
    return torch.where(x > theta, x, 0.0)


def _adds(slots: list[SlotRows]) -> Tensor | None:
    """Σ α_i d_i of each slot [U, D]; None when no slot has one."""
    some = next((slot.add_D for slot in slots if slot.add_D is not None), None)
    if some is None:
        return None
    if len(slots) == 1:
        return some.unsqueeze(0)
    return torch.stack([torch.zeros_like(some) if slot.add_D is None else slot.add_D for slot in slots])


def _dense(slots: list[SlotRows], device: torch.device) -> tuple[Rows, Tensor]:
    """All slots' latents in one table, and β [U, K], zero where a latent is another slot's."""
    parts = [slot.latents for slot in slots if slot.latents is not None]
    rows = Rows.concat(parts)
    if len(slots) == 1:
        return rows, rows.beta_K.unsqueeze(0)
    beta_UK = torch.zeros(len(slots), len(rows.beta_K), device=device)
    k = 0
    for u, slot in enumerate(slots):
        if slot.latents is not None:
            beta_UK[u, k : k + len(slot.latents.beta_K)] = slot.latents.beta_K
            k += len(slot.latents.beta_K)
    return rows, beta_UK
