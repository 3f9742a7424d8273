"""The edit of one hooked layer as ONE Triton kernel: a program per row of the step, which ends at once where nothing is edited.

    read     x_k = e_k · h + b_k                           h = hidden + residual, unedited
    write    hidden += Σ_k (α_k + β_k φ(x_k)) d_k          and ‖Δ‖/‖h‖ of the row

Both go over the width in tiles, so any width fits; the stream's second reading comes out of the cache. Rows of the formula are
taken GROUP at a time, so that many of them do not wait for one reduction each. Products and sums are plain fp32, never TF32. What
the program writes depends on every value that it read before, through the reductions, so editing in place is safe.

Compiled on first use, never within a capture: `warm` launches it once. Tested in Triton's interpreter against the torch operator
and the reference, and compiled for the architectures of `docs/gpu.md`; not yet run on a GPU.

Axes: T rows, D d_model, L layers, S slots, K rows of the formula in a slot, P in the pool, C in a group, G groups, W one tile of
the width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["GROUP", "TILE", "WARPS", "Buffers", "launch", "warm"]

GROUP = 8
TILE = 512
WARPS = 4


class Buffers(NamedTuple):
    """What the kernel reads, all of it persistent."""

    row_slot_T: Tensor
    """int32; 0 is the unedited row."""
    count_LS: Tensor
    """int32, rows of the formula in a slot at a layer."""
    reads_LS: Tensor
    """int32, how many of them have β ≠ 0; they come first."""
    place_LSK: Tensor
    """int32, where in the pool they are."""
    alpha_LSK: Tensor
    beta_LSK: Tensor
    e_PD: Tensor
    d_PD: Tensor
    b_P: Tensor
    theta_P: Tensor
    ratio_LT: Tensor
    """Written for every row with a slot, and for no other."""


def launch(buffers: Buffers, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
    """Edit `hidden` in place at the `layer`-th hooked layer."""
    n, d_model = hidden.shape
    _edit[(n,)](
        hidden,
        residual,
        *buffers,
        layer,
        buffers.count_LS.shape[1],
        buffers.ratio_LT.shape[1],
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        D=d_model,
        K=buffers.place_LSK.shape[2],
        PAIR=residual is not None,
        GROUP_=GROUP,
        TILE_=min(TILE, triton.next_power_of_2(d_model)),
        num_warps=WARPS,
    )


def warm(buffers: Buffers, dtype: torch.dtype) -> None:
    """Compile both forms, on a row that is not edited."""
    hidden = torch.zeros(1, buffers.e_PD.shape[1], dtype=dtype, device=buffers.e_PD.device)
    launch(buffers, 0, hidden, None)
    launch(buffers, 0, hidden, hidden.clone())


# The layer, the number of slots and of rows must not be specialised on: a new value would compile again, maybe within a capture.
@triton.jit(do_not_specialize=["layer", "n_slots", "n_rows"])  # type: ignore[untyped-decorator]
def _edit(  # type: ignore[no-untyped-def]
    hidden_TD,
    residual_TD,
    row_slot_T,
    count_LS,
    reads_LS,
    place_LSK,
    alpha_LSK,
    beta_LSK,
    e_PD,
    d_PD,
    b_P,
    theta_P,
    ratio_LT,
    layer,
    n_slots,
    n_rows,
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
    at = layer * n_slots + slot
    n, n_reads = tl.load(count_LS + at), tl.load(reads_LS + at)
    if n == 0:
        tl.store(ratio_LT + layer * n_rows + t, 0.0)
        return
    hidden_D = hidden_TD + t * hidden_stride
    residual_D = residual_TD + t * residual_stride if PAIR else hidden_D
    table = at.to(tl.int64) * K
    in_group_C, group_G, in_tile_W = tl.arange(0, GROUP_), tl.arange(0, K // GROUP_), tl.arange(0, TILE_)
    k_GC = group_G[:, None] * GROUP_ + in_group_C[None, :]
    c_GC = tl.load(alpha_LSK + table + k_GC, mask=k_GC < n, other=0.0)

    for g in range(tl.cdiv(n_reads, GROUP_)):
        k_C = g * GROUP_ + in_group_C
        place_C = tl.load(place_LSK + table + k_C, mask=k_C < n_reads, other=0)
        x_C = tl.load(b_P + place_C)
        for lo in range(0, D, TILE_):
            w_W = lo + in_tile_W
            h_W = tl.load(hidden_D + w_W, mask=w_W < D, other=0.0).to(tl.float32)
            if PAIR:
                h_W += tl.load(residual_D + w_W, mask=w_W < D, other=0.0).to(tl.float32)
            inside_CW = (k_C < n_reads)[:, None] & (w_W < D)[None, :]
            e_CW = tl.load(e_PD + place_C.to(tl.int64)[:, None] * D + w_W[None, :], mask=inside_CW, other=0.0)
            x_C += tl.sum(e_CW * h_W[None, :], 1)
        phi_C = tl.where(x_C > tl.load(theta_P + place_C), x_C, 0.0)
        beta_C = tl.load(beta_LSK + table + k_C, mask=k_C < n_reads, other=0.0)
        c_GC += tl.where((group_G == g)[:, None], (beta_C * phi_C)[None, :], 0.0)

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
    tl.store(ratio_LT + layer * n_rows + t, tl.sqrt(tl.sum(delta2_W, 0)) / norm)
