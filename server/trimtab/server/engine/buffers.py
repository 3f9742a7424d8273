"""The persistent buffers of the edit inside CUDA graphs: what the host writes before a forward, and what a replayed graph reads.

Per row of the step: its slot, its position, its token. Per slot and hooked layer: how many rows of the formula there are and of
which kind, and each of them as a few numbers that point into the pool, where every different latent is stored once.

Rows of the formula in a slot come in this order, so that each kind is a run:

    reads           β ≠ 0, no gate
    reads, gated    β ≠ 0                        the gated ones are [SHAPE.GATES_LO, SHAPE.GATES_HI)
    gated           β = 0
    adds            β = 0, no gate

Axes: T rows of the step, padding included, D d_model, L hooked layers, S slots, K rows of the formula in a slot, P in the pool,
C columns of `SHAPE`, V tokens of the vocabulary, E entries of `Onward`.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MAX_ROWS", "POOL", "SHAPE", "Buffers"]

MAX_ROWS = 64
"""Rows of the formula that a request can have at one position and hook point."""
POOL = 4096


class SHAPE(IntEnum):
    """Columns of `shape_LSC`."""

    ROWS = 0
    READS = 1
    """Rows with β ≠ 0; they come first."""
    GATES_LO = 2
    GATES_HI = 3
    ONWARD = 4
    """How many gates are `onward`."""
    EXCLUDES = 5
    """How many rows leave special tokens alone."""
    WIDTH = 8


class Buffers(NamedTuple):
    """All of them on the device; slot 0 is the unedited row, place 0 of the pool nobody's."""

    row_slot_T: Tensor
    """int32; 0 is the unedited row."""
    position_T: Tensor
    """int64, absolute; written in steps with a gate that stays open."""
    token_T: Tensor
    """int32, the buffer that the model reads its tokens from."""
    special_V: Tensor
    """int8, whether a token is special."""
    opened_E: Tensor
    """int64, `Onward.opened_S`."""
    shape_LSC: Tensor
    """int32, by `SHAPE`."""
    place_LSK: Tensor
    """int32, where in the pool the row is."""
    alpha_LSK: Tensor
    beta_LSK: Tensor
    gate_LSK: Tensor
    """int32, where in the pool the reader of the row's gate is; 0 without one."""
    above_LSK: Tensor
    entry_LSK: Tensor
    """int32, of `Onward`; 0 unless the gate stays open."""
    excludes_LSK: Tensor
    """int8, whether special tokens are left alone."""
    e_PD: Tensor
    d_PD: Tensor
    b_P: Tensor
    theta_P: Tensor
    ratio_LT: Tensor
    """‖Δ‖/‖h‖, written for every row with a slot, and for no other."""
    flags_LT: Tensor
    """uint8, `proof.GATE` and `proof.SPECIAL`, written where the ratio is."""

    @classmethod
    def of(
        cls,
        n_layers: int,
        d_model: int,
        n_slots: int,
        n_rows: int,
        token_T: Tensor,
        special_V: Tensor | None,
        opened_E: Tensor,
    ) -> "Buffers":
        """Buffers for so many slots beside slot 0, and so many rows a step, beside those that exist already."""
        device = opened_E.device

        def table(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        slots = (n_layers, n_slots + 1)
        return cls(
            row_slot_T=table(n_rows, dtype=torch.int32),
            position_T=table(n_rows, dtype=torch.int64),
            token_T=token_T,
            special_V=table(1, dtype=torch.int8) if special_V is None else special_V.view(torch.int8),
            opened_E=opened_E,
            shape_LSC=table(*slots, SHAPE.WIDTH, dtype=torch.int32),
            place_LSK=table(*slots, MAX_ROWS, dtype=torch.int32),
            alpha_LSK=table(*slots, MAX_ROWS),
            beta_LSK=table(*slots, MAX_ROWS),
            gate_LSK=table(*slots, MAX_ROWS, dtype=torch.int32),
            above_LSK=table(*slots, MAX_ROWS),
            entry_LSK=table(*slots, MAX_ROWS, dtype=torch.int32),
            excludes_LSK=table(*slots, MAX_ROWS, dtype=torch.int8),
            e_PD=table(POOL, d_model),
            d_PD=table(POOL, d_model),
            b_P=table(POOL),
            theta_P=table(POOL),
            ratio_LT=table(n_layers, n_rows).fill_(-1.0),
            flags_LT=table(n_layers, n_rows, dtype=torch.uint8),
        )
