"""What `kernel` computes, in torch ops that can be captured: its oracle, and what runs where Triton cannot.

Every row of the batch is computed, whatever its slot, and only what an edited row gives is kept.

Axes: as in `buffers`; C rows of the formula taken at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.server.engine.buffers import MAX_ROWS, Buffers
from trimtab.server.engine.onward import NEVER
from trimtab.server.engine.proof import GATE, SPECIAL

__all__ = ["launch", "watch"]

_CHUNK = 4


def launch(buffers: Buffers, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
    """Edit `hidden` in place at the `layer`-th hooked layer."""
    watch(buffers, layer, hidden, residual)  # a row may be the one that opens its gate
    b, n, h_TD = buffers, len(hidden), _stream(hidden, residual)
    slot_T, special_T = b.row_slot_T[:n], _special(b, n)
    delta_TD, flags_T = torch.zeros_like(h_TD), torch.zeros(n, dtype=torch.uint8, device=hidden.device)
    for chunk in _chunks(b, layer, slot_T):
        x_TC = _reads(b, h_TD, chunk.place_TC)
        phi_TC = torch.where(x_TC > b.theta_P[chunk.place_TC], x_TC, 0.0)
        left_TC = special_T & chunk.excludes_TC
        since_TC = b.position_T[:n, None] >= b.opened_E[chunk.entry_TC]
        fires_TC = _reads(b, h_TD, chunk.gate_TC) > chunk.above_TC
        gated_TC = chunk.gate_TC > 0
        open_TC = torch.where(chunk.entry_TC > 0, since_TC, fires_TC | ~gated_TC) & ~left_TC
        coefficient_TC = torch.where(open_TC, chunk.alpha_TC + chunk.beta_TC * phi_TC, 0.0)
        delta_TD += torch.einsum("tc,tcd->td", coefficient_TC, b.d_PD[chunk.place_TC])
        flags_T |= (open_TC & gated_TC).any(1).to(torch.uint8) * GATE | left_TC.any(1).to(torch.uint8) * SPECIAL
    ratio_T = delta_TD.norm(dim=-1) / h_TD.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    b.ratio_LT[layer, :n] = torch.where(slot_T > 0, ratio_T, -1.0)
    b.flags_LT[layer, :n] = flags_T
    hidden.copy_(torch.where(slot_T.unsqueeze(1) > 0, (hidden.float() + delta_TD).to(hidden.dtype), hidden))


def watch(buffers: Buffers, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
    """Lower the entries of gates that stay open to the first position on which they fire."""
    b, n, h_TD = buffers, len(hidden), _stream(hidden, residual)
    special_T = _special(b, n)
    for chunk in _chunks(b, layer, b.row_slot_T[:n]):
        fires_TC = (_reads(b, h_TD, chunk.gate_TC) > chunk.above_TC) & ~(special_T & chunk.excludes_TC)
        first_TC = torch.where(fires_TC & (chunk.entry_TC > 0), b.position_T[:n, None], NEVER)
        b.opened_E.scatter_reduce_(0, chunk.entry_TC.flatten(), first_TC.flatten(), "amin")


class _Chunk(NamedTuple):
    """Some rows of the formula of each row's slot."""

    place_TC: Tensor
    alpha_TC: Tensor
    beta_TC: Tensor
    gate_TC: Tensor
    above_TC: Tensor
    entry_TC: Tensor
    excludes_TC: Tensor


def _chunks(b: Buffers, layer: int, slot_T: Tensor) -> Iterator[_Chunk]:
    tables = (b.place_LSK, b.alpha_LSK, b.beta_LSK, b.gate_LSK, b.above_LSK, b.entry_LSK, b.excludes_LSK)
    place, alpha, beta, gate, above, entry, excludes = (table[layer].index_select(0, slot_T) for table in tables)
    for k in range(0, MAX_ROWS, _CHUNK):
        c = slice(k, k + _CHUNK)
        yield _Chunk(
            place[:, c], alpha[:, c], beta[:, c], gate[:, c], above[:, c], entry[:, c].long(), excludes[:, c] != 0
        )


def _stream(hidden: Tensor, residual: Tensor | None) -> Tensor:
    return hidden.float() if residual is None else hidden.float() + residual.float()


def _reads(b: Buffers, h_TD: Tensor, place_TC: Tensor) -> Tensor:
    """e · h + b of rows of the pool."""
    return torch.einsum("td,tcd->tc", h_TD, b.e_PD[place_TC]) + b.b_P[place_TC]


def _special(b: Buffers, n: int) -> Tensor:
    """Whether each row's token is special [T, 1]."""
    return b.special_V[b.token_T[:n].long().clamp(0, len(b.special_V) - 1), None] != 0
