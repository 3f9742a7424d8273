"""A step's work is the reference formula on every edited row, whatever the batch looks like, and nothing on the others."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.attribution.edit import Rows, delta
from trimtab.server.engine.tables import SlotRows
from trimtab.server.engine.work import DENSE_LATENTS, LONG_ROWS, LayerWork, Piece

CPU = torch.device("cpu")
D = 24


def slot(n_latents: int, seed: int, *, adds: bool = True) -> tuple[SlotRows, Rows]:
    """A folded slot, and the rows that it folds."""
    g = torch.Generator().manual_seed(seed)
    d_KD, e_KD = torch.randn(2, n_latents + adds, D, generator=g)
    beta_K, b_K = torch.randn(2, n_latents + adds, generator=g)
    theta_K = torch.where(torch.rand(n_latents + adds, generator=g) < 0.3, -math.inf, 0.5)
    alpha_K = torch.randn(n_latents + adds, generator=g) if adds else torch.zeros(n_latents)
    if adds:
        beta_K[-1] = 0.0
    rows = Rows(alpha_K, beta_K, e_KD, b_K, theta_K, d_KD)
    kept = Rows(*(getattr(rows, f)[:n_latents] for f in Rows.__dataclass_fields__))
    return SlotRows(alpha_K @ d_KD if adds else None, kept if n_latents else None), rows


def check(pieces: list[tuple[SlotRows, Rows, int, int]], n_rows: int, residual: bool = True) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, other = torch.randn(2, n_rows, D, generator=g)
    h = hidden + other if residual else hidden.clone()
    expected, before = torch.zeros_like(h), hidden.clone()
    ratios = []
    for _, rows, start, stop in pieces:
        expected[start:stop] = delta(h[start:stop], rows)
        ratios.append(expected[start:stop].norm(dim=-1) / h[start:stop].norm(dim=-1))
    work = LayerWork([Piece(s, start, stop) for s, _, start, stop in pieces], CPU)
    norms = work.apply(hidden, other if residual else None)
    torch.testing.assert_close(hidden, before + expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms.delta_N / norms.stream_N, torch.cat(ratios), rtol=1e-4, atol=1e-5)
    edited = torch.zeros(n_rows, dtype=torch.bool)
    for _, _, start, stop in pieces:
        edited[start:stop] = True
    assert torch.equal(hidden[~edited], before[~edited])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 2 * LONG_ROWS)), min_size=1, max_size=7),
    st.booleans(),
)
def test_any_batch_is_the_reference(batch: list[tuple[int, int, int]], residual: bool) -> None:
    slots = [slot(n, seed, adds=n == 0 or seed % 2 == 0) for seed, n in enumerate([0, 1, 3, 2, 5, 8])]
    pieces, row = [], 0
    for which, gap, length in batch:
        row += gap
        pieces.append((*slots[which], row, row + length))
        row += length
    check(pieces, row + 2, residual)


def test_many_slots_with_many_latents_are_padded() -> None:
    slots = [slot(DENSE_LATENTS // 8 + u, u, adds=u % 2 == 0) for u in range(9)]
    pieces = [(*slots[i % 9], i, i + 1) for i in range(24)]
    check(pieces, 24)
    work = LayerWork([Piece(s, a, b) for s, _, a, b in pieces], CPU)
    assert work.paths == ("padded",)


def test_long_slots_beside_short_ones_have_products_of_their_own() -> None:
    slots = [slot(DENSE_LATENTS // 2, u) for u in range(4)]
    pieces = [(*slots[0], 0, 40), (*slots[1], 42, 43), (*slots[2], 43, 44), (*slots[3], 50, 90)]
    check(pieces, 95)
    work = LayerWork([Piece(s, a, b) for s, _, a, b in pieces], CPU)
    assert work.paths == ("padded", "long")


def test_few_latents_are_one_pair_of_products() -> None:
    slots = [slot(2, u) for u in range(5)]
    work = LayerWork([Piece(s, u, u + 1) for u, (s, _) in enumerate(slots)], CPU)
    assert work.paths == ("dense",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_streams_are_edited_in_fp32(dtype: torch.dtype) -> None:
    one, rows = slot(3, 2)
    hidden, residual = (torch.randn(2, 6, D, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
    h = hidden.float() + residual.float()
    expected = (hidden.float() + delta(h, rows)).to(dtype)
    LayerWork([Piece(one, 0, 6)], CPU).apply(hidden, residual)
    torch.testing.assert_close(hidden, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_requests_with_one_slot_share_its_rows() -> None:
    one, rows = slot(3, 0)
    check([(one, rows, i, i + 1) for i in range(0, 12, 2)], 13)


def test_a_row_is_edited_alike_in_any_company() -> None:
    slots = [slot(3, u) for u in range(4)]
    h = torch.randn(4, D, generator=torch.Generator().manual_seed(9))

    def run(pieces: list[Piece], hidden: Tensor) -> Tensor:
        LayerWork(pieces, CPU).apply(hidden, None)
        return hidden

    together = run([Piece(s, u, u + 1) for u, (s, _) in enumerate(slots)], h.clone())
    for u, (s, _) in enumerate(slots):
        alone = run([Piece(s, 0, 1)], h[u : u + 1].clone())
        torch.testing.assert_close(alone[0], together[u], rtol=1e-5, atol=1e-5)
    assert all(a.start < b.start for a, b in pairwise([Piece(s, u, u + 1) for u, (s, _) in enumerate(slots)]))
