"""Rows that depend on the token they meet, batched over slots: gated ones, and those that leave special tokens alone.

    Δ = Σ_k g_k (α_k + β_k φ(e_k · h + b_k)) d_k          g_k = [gate e · h + b > above] · [token not special, where it matters]

A row without a gate has above = −inf. Slots of few rows each (decode) are padded to one shape and cost a few bmm together,
however many they are; a slot with many rows (prefill) is a group of its own. Gates of mode `onward` take two passes, because a
slot's rows may open what another slot's rows, later in the same step, find open: first all groups say where their gates fire,
then g_k = [position ≥ the first position on which gate k fired].

Axes: N edited rows, D d_model, U slots of a group, M rows and K latents per slot, padded; row N is the padding's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.server.engine.onward import NEVER, Onward
from trimtab.server.engine.proof import GATE, SPECIAL
from trimtab.server.engine.tables import Conditional

__all__ = ["Group", "Tokens", "apply"]


class Tokens(NamedTuple):
    """What the step's batch is made of, row by row, on the device."""

    special_T: Tensor
    """Whether the token is special."""
    position_T: Tensor
    """Absolute position in its request."""


class Group(NamedTuple):
    """Slots padded to one shape."""

    index_UM: Tensor
    """Edited rows of each slot; padding points at the extra row N."""
    e_UKD: Tensor
    d_UKD: Tensor
    gate_e_UKD: Tensor
    b_UK: Tensor
    theta_UK: Tensor
    alpha_UK: Tensor
    beta_UK: Tensor
    gate_b_UK: Tensor
    above_UK: Tensor
    gated_UK: Tensor
    special_UK: Tensor
    entry_UMK: Tensor | None
    """Entries of `Onward`, 0 where a row is not gated so; None when no row is."""
    reads: bool
    """Whether any β is not 0."""

    @classmethod
    def of(
        cls, slots: Sequence[Conditional], index: Sequence[Tensor], entries: Sequence[Tensor] | None, n: int
    ) -> "Group":
        """The group of these slots; `index[u]` are the edited rows of slot u, `entries[u]` [M_u, K_u] their entries."""
        device = slots[0].above_K.device
        pad = torch.nn.utils.rnn.pad_sequence

        def padded(rows: list[Tensor], value: float = 0.0) -> Tensor:
            return pad(rows, batch_first=True, padding_value=value)

        def field(name: str) -> Tensor:
            return padded([getattr(slot, name) for slot in slots])

        def row_field(name: str) -> Tensor:
            return padded([getattr(slot.rows, name) for slot in slots])

        entry_UMK = None
        if entries is not None:
            m, k = max(len(rows) for rows in index), max(len(slot.above_K) for slot in slots)
            entry_UMK = torch.zeros(len(slots), m, k, dtype=torch.int64)
            for u, found in enumerate(entries):
                entry_UMK[u, : found.shape[0], : found.shape[1]] = found
            entry_UMK = entry_UMK.to(device)
        return cls(
            padded(list(index), n).to(device),
            row_field("e_KD"),
            row_field("d_KD"),
            field("gate_e_KD"),
            row_field("b_K"),
            row_field("theta_K"),
            row_field("alpha_K"),
            row_field("beta_K"),
            field("gate_b_K"),
            field("above_K"),
            field("gated_K"),
            field("special_K"),
            entry_UMK,
            any(slot.reads for slot in slots),
        )


def apply(groups: Sequence[Group], delta_ND: Tensor, h_ND: Tensor, tokens_N: Tokens, onward: Onward) -> Tensor:
    """Flags of every edited row [N]; the groups' Δ is added to `delta_ND`."""
    n, d = h_ND.shape
    h_XD = torch.cat([h_ND, h_ND.new_zeros(1, d)])
    special_X = torch.cat([tokens_N.special_T, tokens_N.special_T.new_zeros(1)])
    position_X = torch.cat([tokens_N.position_T, tokens_N.position_T.new_full((1,), NEVER)])
    flags_X = torch.zeros(n + 1, dtype=torch.uint8, device=h_ND.device)
    opened = []
    for group in groups:
        h_UMD = h_XD[group.index_UM]
        x_UMK = torch.baddbmm(group.gate_b_UK.unsqueeze(1), h_UMD, group.gate_e_UKD.transpose(1, 2))
        left_UMK = special_X[group.index_UM].unsqueeze(2) & group.special_UK.unsqueeze(1)
        open_UMK = (x_UMK > group.above_UK.unsqueeze(1)) & ~left_UMK
        if group.entry_UMK is not None:
            position_UM1 = position_X[group.index_UM].unsqueeze(2)
            first_UMK = torch.where(open_UMK & (group.entry_UMK > 0), position_UM1, NEVER)
            onward.opened_S.scatter_reduce_(0, group.entry_UMK.flatten(), first_UMK.flatten(), "amin")
        opened.append((h_UMD, left_UMK, open_UMK))
    for group, (h_UMD, left_UMK, open_UMK) in zip(groups, opened, strict=True):
        if group.entry_UMK is not None:
            position_UM1 = position_X[group.index_UM].unsqueeze(2)
            since_UMK = (position_UM1 >= onward.opened_S[group.entry_UMK]) & ~left_UMK
            open_UMK = torch.where(group.entry_UMK > 0, since_UMK, open_UMK)
        coefficient_UMK = group.alpha_UK.unsqueeze(1)
        if group.reads:
            x_UMK = torch.baddbmm(group.b_UK.unsqueeze(1), h_UMD, group.e_UKD.transpose(1, 2))
            phi_UMK = torch.where(x_UMK > group.theta_UK.unsqueeze(1), x_UMK, 0.0)
            coefficient_UMK = coefficient_UMK + group.beta_UK.unsqueeze(1) * phi_UMK
        delta_UMD = torch.where(open_UMK, coefficient_UMK, 0.0) @ group.d_UKD
        rows = group.index_UM.flatten()
        delta_ND += h_ND.new_zeros(n + 1, d).index_add_(0, rows, delta_UMD.flatten(0, 1))[:n]
        flags_UM = (open_UMK & group.gated_UK.unsqueeze(1)).any(2) * GATE + left_UMK.any(2) * SPECIAL
        flags_X.index_add_(0, rows, flags_UM.flatten().to(torch.uint8))
    return flags_X[:n]
