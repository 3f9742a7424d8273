"""The edit of one hooked layer as ONE Triton kernel: a program per row of the step, which ends at once where nothing is edited.

    read     x_k = e_k · h + b_k                           h = hidden + residual, unedited
    gate     g_k = [gate e · h + b > above]                and the token is not special, where that matters
    write    hidden += Σ_k g_k (α_k + β_k φ(x_k)) d_k      and ‖Δ‖/‖h‖ and the flags of the row

All go over the width in tiles, so any width fits; the stream's second reading comes out of the cache. Rows of the formula are
taken GROUP at a time, so that many of them do not wait for one reduction each. Products and sums are plain fp32, never TF32. What
the program writes depends on every value that it read before, through the reductions, so editing in place is safe.

A gate that stays open reads where it opened, and the program of the token that opens it says so itself. Programs do not wait for
each other: where a step runs several tokens of one request, `watch` goes over them before, and finds where each gate opens.

Compiled on first use, never within a capture: `warm` launches it once. Tested in Triton's interpreter against the torch operator
and the reference, and compiled for the architectures of `docs/gpu.md`; not yet run on a GPU.

Axes: as in `buffers`; C rows of the formula in a group, G groups, W one tile of the width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.server.engine.buffers import SHAPE, Buffers
from trimtab.server.engine.onward import NEVER
from trimtab.server.engine.proof import GATE, SPECIAL

__all__ = ["GROUP", "TILE", "WARPS", "launch", "warm", "watch"]

GROUP = 8
TILE = 512
WARPS = 4
_ROWS, _READS, _GATES_LO, _GATES_HI, _ONWARD, _EXCLUDES, _WIDTH = (tl.constexpr(int(column)) for column in SHAPE)
_NEVER, _GATE, _SPECIAL = tl.constexpr(NEVER), tl.constexpr(GATE), tl.constexpr(SPECIAL)


def launch(buffers: Buffers, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
    """Edit `hidden` in place at the `layer`-th hooked layer."""
    _run(_edit, buffers, layer, hidden, residual)


def watch(buffers: Buffers, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
    """Lower the entries of gates that stay open to the first position on which they fire."""
    _run(_watch, buffers, layer, hidden, residual)


def warm(buffers: Buffers, dtype: torch.dtype) -> None:
    """Compile both forms of both, on a row that is not edited."""
    hidden = torch.zeros(1, buffers.e_PD.shape[1], dtype=dtype, device=buffers.e_PD.device)
    for residual in (None, hidden.clone()):
        launch(buffers, 0, hidden, residual)
        watch(buffers, 0, hidden, residual)


def _run(kernel: Any, b: Buffers, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
    n, d_model = hidden.shape
    kernel[(n,)](
        hidden,
        residual,
        *b,
        layer,
        b.shape_LSC.shape[1],
        b.ratio_LT.shape[1],
        len(b.special_V),
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        D=d_model,
        K=b.place_LSK.shape[2],
        PAIR=residual is not None,
        GROUP_=GROUP,
        TILE_=min(TILE, triton.next_power_of_2(d_model)),
        num_warps=WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _read(place_C, lane_C, hidden_D, residual_D, e_PD, b_P, D: tl.constexpr, PAIR: tl.constexpr, TILE_: tl.constexpr):  # type: ignore[no-untyped-def]
    """e · h + b of rows of the pool."""
    x_C = tl.load(b_P + place_C)
    in_tile_W = tl.arange(0, TILE_)
    for lo in range(0, D, TILE_):
        w_W = lo + in_tile_W
        h_W = tl.load(hidden_D + w_W, mask=w_W < D, other=0.0).to(tl.float32)
        if PAIR:
            h_W += tl.load(residual_D + w_W, mask=w_W < D, other=0.0).to(tl.float32)
        inside_CW = lane_C[:, None] & (w_W < D)[None, :]
        e_CW = tl.load(e_PD + place_C.to(tl.int64)[:, None] * D + w_W[None, :], mask=inside_CW, other=0.0)
        x_C += tl.sum(e_CW * h_W[None, :], 1)
    return x_C


@triton.jit
def _is_special(token_T, special_V, n_vocab, t):  # type: ignore[no-untyped-def]
    """Whether the row's token is special."""
    token = tl.load(token_T + t)
    return tl.load(special_V + tl.minimum(tl.maximum(token, 0), n_vocab - 1)) != 0


# The layer and the numbers of slots and rows must not be specialised on: a new value would compile again, maybe within a capture.
@triton.jit(do_not_specialize=["layer", "n_slots", "n_rows", "n_vocab"])  # type: ignore[untyped-decorator]
def _watch(  # type: ignore[no-untyped-def]
    hidden_TD,
    residual_TD,
    row_slot_T,
    position_T,
    token_T,
    special_V,
    opened_E,
    shape_LSC,
    place_LSK,
    alpha_LSK,
    beta_LSK,
    gate_LSK,
    above_LSK,
    entry_LSK,
    excludes_LSK,
    e_PD,
    d_PD,
    b_P,
    theta_P,
    ratio_LT,
    flags_LT,
    layer,
    n_slots,
    n_rows,
    n_vocab,
    hidden_stride,
    residual_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    PAIR: tl.constexpr,
    GROUP_: tl.constexpr,
    TILE_: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slot_T + t)
    at = (layer * n_slots + slot).to(tl.int64)
    shape_C = shape_LSC + at * _WIDTH
    if slot == 0 or tl.load(shape_C + _ONWARD) == 0:
        return
    gates_lo, gates_hi = tl.load(shape_C + _GATES_LO), tl.load(shape_C + _GATES_HI)
    hidden_D = hidden_TD + t * hidden_stride
    residual_D = residual_TD + t * residual_stride if PAIR else hidden_D
    table, position = at * K, tl.load(position_T + t)
    is_special = _is_special(token_T, special_V, n_vocab, t)
    for g in range(gates_lo // GROUP_, tl.cdiv(gates_hi, GROUP_)):
        k_C = g * GROUP_ + tl.arange(0, GROUP_)
        gated_C = (k_C >= gates_lo) & (k_C < gates_hi)
        place_C = tl.load(gate_LSK + table + k_C, mask=gated_C, other=0)
        x_C = _read(place_C, gated_C, hidden_D, residual_D, e_PD, b_P, D, PAIR, TILE_)
        left_C = is_special & (tl.load(excludes_LSK + table + k_C, mask=gated_C, other=0) != 0)
        fires_C = gated_C & (x_C > tl.load(above_LSK + table + k_C, mask=gated_C, other=0.0)) & (left_C == 0)
        entry_C = tl.load(entry_LSK + table + k_C, mask=gated_C, other=0)
        tl.atomic_min(opened_E + entry_C, position, mask=fires_C & (entry_C > 0))


@triton.jit(do_not_specialize=["layer", "n_slots", "n_rows", "n_vocab"])  # type: ignore[untyped-decorator]
def _edit(  # type: ignore[no-untyped-def]
    hidden_TD,
    residual_TD,
    row_slot_T,
    position_T,
    token_T,
    special_V,
    opened_E,
    shape_LSC,
    place_LSK,
    alpha_LSK,
    beta_LSK,
    gate_LSK,
    above_LSK,
    entry_LSK,
    excludes_LSK,
    e_PD,
    d_PD,
    b_P,
    theta_P,
    ratio_LT,
    flags_LT,
    layer,
    n_slots,
    n_rows,
    n_vocab,
    hidden_stride,
    residual_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    PAIR: tl.constexpr,
    GROUP_: tl.constexpr,
    TILE_: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slot_T + t)
    if slot == 0:
        return
    at = (layer * n_slots + slot).to(tl.int64)
    shape_C = shape_LSC + at * _WIDTH
    n, n_reads, told = tl.load(shape_C + _ROWS), tl.load(shape_C + _READS), layer * n_rows + t
    if n == 0:
        tl.store(ratio_LT + told, 0.0)
        tl.store(flags_LT + told, 0)
        return
    hidden_D = hidden_TD + t * hidden_stride
    residual_D = residual_TD + t * residual_stride if PAIR else hidden_D
    table = at * K
    in_group_C, group_G, in_tile_W = tl.arange(0, GROUP_), tl.arange(0, K // GROUP_), tl.arange(0, TILE_)
    k_GC = group_G[:, None] * GROUP_ + in_group_C[None, :]
    c_GC = tl.load(alpha_LSK + table + k_GC, mask=k_GC < n, other=0.0)

    for g in range(tl.cdiv(n_reads, GROUP_)):
        k_C = g * GROUP_ + in_group_C
        place_C = tl.load(place_LSK + table + k_C, mask=k_C < n_reads, other=0)
        x_C = _read(place_C, k_C < n_reads, hidden_D, residual_D, e_PD, b_P, D, PAIR, TILE_)
        phi_C = tl.where(x_C > tl.load(theta_P + place_C), x_C, 0.0)
        beta_C = tl.load(beta_LSK + table + k_C, mask=k_C < n_reads, other=0.0)
        c_GC += tl.where((group_G == g)[:, None], (beta_C * phi_C)[None, :], 0.0)

    flags = 0
    is_special = slot < 0
    if tl.load(shape_C + _EXCLUDES) > 0:
        is_special = _is_special(token_T, special_V, n_vocab, t)
        left_GC = is_special & (tl.load(excludes_LSK + table + k_GC, mask=k_GC < n, other=0) != 0)
        c_GC = tl.where(left_GC, 0.0, c_GC)
        flags += tl.where(is_special, _SPECIAL, 0)
    gates_lo, gates_hi = tl.load(shape_C + _GATES_LO), tl.load(shape_C + _GATES_HI)
    n_open = 0
    for g in range(gates_lo // GROUP_, tl.cdiv(gates_hi, GROUP_)):
        k_C = g * GROUP_ + in_group_C
        gated_C = (k_C >= gates_lo) & (k_C < gates_hi)
        place_C = tl.load(gate_LSK + table + k_C, mask=gated_C, other=0)
        x_C = _read(place_C, gated_C, hidden_D, residual_D, e_PD, b_P, D, PAIR, TILE_)
        left_C = is_special & (tl.load(excludes_LSK + table + k_C, mask=gated_C, other=0) != 0)
        open_C = gated_C & (x_C > tl.load(above_LSK + table + k_C, mask=gated_C, other=0.0)) & (left_C == 0)
        entry_C = tl.load(entry_LSK + table + k_C, mask=gated_C, other=0)
        if tl.load(shape_C + _ONWARD) > 0:
            position = tl.load(position_T + t)
            tl.atomic_min(opened_E + entry_C, position, mask=open_C & (entry_C > 0))
            opened_C = tl.load(opened_E + entry_C, mask=entry_C > 0, other=_NEVER)
            open_C |= (entry_C > 0) & (position >= opened_C) & (left_C == 0)
        c_GC = tl.where((group_G == g)[:, None] & (gated_C & (open_C == 0))[None, :], 0.0, c_GC)
        n_open += tl.sum(open_C.to(tl.int32), 0)
    flags += tl.where(n_open > 0, _GATE, 0)

    h2_W, delta2_W = tl.zeros([TILE_], tl.float32), tl.zeros([TILE_], tl.float32)
    for lo in range(0, D, TILE_):
        w_W = lo + in_tile_W
        part_W = tl.load(hidden_D + w_W, mask=w_W < D, other=0.0).to(tl.float32)
        h_W = part_W
        if PAIR:
            h_W += tl.load(residual_D + w_W, mask=w_W < D, other=0.0).to(tl.float32)
        delta_W = tl.zeros([TILE_], tl.float32)
        for g in range(tl.cdiv(n, GROUP_)):
            k_C = g * GROUP_ + in_group_C
            place_C = tl.load(place_LSK + table + k_C, mask=k_C < n, other=0)
            c_C = tl.sum(tl.where((group_G == g)[:, None], c_GC, 0.0), 0)
            inside_CW = (k_C < n)[:, None] & (w_W < D)[None, :]
            d_CW = tl.load(d_PD + place_C.to(tl.int64)[:, None] * D + w_W[None, :], mask=inside_CW, other=0.0)
            delta_W += tl.sum(c_C[:, None] * d_CW, 0)
        tl.store(hidden_D + w_W, (part_W + delta_W).to(hidden_TD.dtype.element_ty), mask=w_W < D)
        h2_W += h_W * h_W
        delta2_W += delta_W * delta_W
    # A norm of NaN stays NaN, which the host takes for a failure.
    norm = tl.sqrt(tl.sum(h2_W, 0))
    norm = tl.where(norm < 1e-37, 1e-37, norm)
    tl.store(ratio_LT + told, tl.sqrt(tl.sum(delta2_W, 0)) / norm)
    tl.store(flags_LT + told, flags)
