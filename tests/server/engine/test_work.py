"""A step's work is the reference formula on every edited row, whatever the batch looks like, and nothing on the others."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.attribution.edit import Rows, delta
from trimtab.server.engine import work as work_
from trimtab.server.engine.conditional import Tokens
from trimtab.server.engine.onward import NEVER, Onward, Watch
from trimtab.server.engine.proof import GATE, SPECIAL
from trimtab.server.engine.tables import Conditional, SlotRows
from trimtab.server.engine.work import DENSE_LATENTS, LONG_ROWS, LayerWork, Norms, Piece
from trimtab.server.plan import Gate
from trimtab.server.window import EVERYWHERE

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
    torch.testing.assert_close(Norms.ratios([norms, norms])[1], torch.cat(ratios), rtol=1e-4, atol=1e-5)
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


def test_the_norms_of_many_rows_are_taken_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_, "FEW", 3 * D)
    for n in (3, 4):
        check([(*slot(2, 0), 1, 1 + n)], n + 2)
        h = torch.randn(n, D)
        norms = LayerWork([Piece(slot(2, 0)[0], 0, n)], CPU).apply(h, h.clone())
        assert norms.stream.shape == ((3, D) if n == 3 else (4,))


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


def conditional(k: int, seed: int, *, plain: int = 0) -> SlotRows:
    """A slot of k conditional rows of every kind, beside `plain` unconditional ones."""
    g = torch.Generator().manual_seed(seed)
    e_KD, d_KD, gate_e_KD = torch.randn(3, k, D, generator=g)
    alpha_K, beta_K, b_K, gate_b_K = torch.randn(4, k, generator=g)
    beta_K[torch.rand(k, generator=g) < 0.4] = 0.0
    gated_K, special_K, onward_K = torch.rand(3, k, generator=g) < 0.5
    theta_K = torch.where(torch.rand(k, generator=g) < 0.3, -math.inf, 0.5)
    gate_e_KD[~gated_K], gate_b_K[~gated_K] = 0.0, 0.0
    watches = tuple(
        Watch(0, Gate("b", i, float(seed), "onward"), EVERYWHERE, False) if gated and onward else None
        for i, (gated, onward) in enumerate(zip(gated_K.tolist(), onward_K.tolist(), strict=True))
    )
    rows = Rows(alpha_K, beta_K, e_KD, b_K, theta_K, d_KD)
    above_K = torch.where(gated_K, 2.0, -math.inf)
    unconditional = slot(plain, seed)[0] if plain else SlotRows(None, None)
    found = Conditional(rows, gate_e_KD, gate_b_K, above_K, gated_K, special_K, watches, bool((beta_K != 0).any()))
    return unconditional._replace(conditional=found)


class Span(NamedTuple):
    """One request's rows in a step."""

    slot: SlotRows
    start: int
    n: int
    position: int
    opened: int
    """Where its gates had opened before the step."""


def spelt_out(span: Span, h_ND: Tensor, special_N: Tensor) -> tuple[Tensor, list[int]]:
    """Δ and flags of a span, one token and one row after another."""
    rows = span.slot.conditional
    assert rows is not None
    delta_ND = torch.zeros_like(h_ND)
    if span.slot.add_D is not None:
        delta_ND += span.slot.add_D
    if span.slot.latents is not None:
        delta_ND += delta(h_ND, replace(span.slot.latents, alpha_K=torch.zeros_like(span.slot.latents.beta_K)))
    flags = []
    opened = [span.opened < span.position] * len(rows.watches)
    for t, h_D in enumerate(h_ND):
        flag = 0
        for k, watch in enumerate(rows.watches):
            if rows.special_K[k] and special_N[t]:
                flag |= SPECIAL
                continue
            fires = bool(rows.gate_e_KD[k] @ h_D + rows.gate_b_K[k] > rows.above_K[k])
            opened[k] |= fires
            if not (opened[k] if watch else fires):
                continue
            if rows.gated_K[k]:
                flag |= GATE
            one = Rows(*(getattr(rows.rows, f)[k : k + 1] for f in Rows.__dataclass_fields__))
            delta_ND[t] += delta(h_D.unsqueeze(0), one)[0]
        flags.append(flag)
    return delta_ND, flags


def run_spans(spans: list[Span], n_rows: int) -> LayerWork:
    """Apply the work of these spans, and compare it with `spelt_out`."""
    g = torch.Generator().manual_seed(n_rows)
    hidden, other = torch.randn(2, n_rows, D, generator=g)
    h, before = hidden + other, hidden.clone()
    special_T = torch.rand(n_rows, generator=g) < 0.3
    position_T = torch.zeros(n_rows, dtype=torch.int64)
    onward = Onward(CPU)
    pieces, flags = [], []
    expected = torch.zeros_like(h)
    for span in spans:
        at = slice(span.start, span.start + span.n)
        position_T[at] = torch.arange(span.position, span.position + span.n)
        assert span.slot.conditional is not None
        watches = span.slot.conditional.watches
        entries = onward.take({watch for watch in watches if watch})
        for entry in entries.values():
            onward.opened_S[entry] = span.opened
        onward.forget(list(entries.values()), [span.position] * len(entries))
        found = tuple(entries[watch] if watch else 0 for watch in watches) if entries else ()
        pieces.append(Piece(span.slot, at.start, at.stop, found))
        expected[at], found_flags = spelt_out(span, h[at], special_T[at])
        flags += found_flags
    work = LayerWork(pieces, CPU)
    seen = work.apply(hidden, other, Tokens(special_T, position_T), onward)
    torch.testing.assert_close(hidden, before + expected, rtol=1e-4, atol=1e-4)
    assert seen.flags_N is not None
    assert seen.flags_N.tolist() == flags
    edited = torch.zeros(n_rows, dtype=torch.bool)
    for span in spans:
        edited[span.start : span.start + span.n] = True
    assert torch.equal(hidden[~edited], before[~edited])
    return work


KINDS = [conditional(k, seed, plain=plain) for seed, (k, plain) in enumerate([(1, 0), (2, 3), (5, 0), (8, 1), (3, 0)])]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.integers(0, 2),
            st.integers(1, 2 * LONG_ROWS),
            st.integers(0, 40),
            st.sampled_from([0, 7, 30, NEVER]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_batch_of_conditional_rows_is_spelt_out(batch: list[tuple[SlotRows, int, int, int, int]]) -> None:
    spans, row = [], 0
    for rows, gap, n, position, opened in batch:
        spans.append(Span(rows, row + gap, n, position, opened))
        row += gap + n
    run_spans(spans, row + 1)


def test_sixty_four_gated_slots_are_one_group() -> None:
    slots = [conditional(1 + seed % 3, seed) for seed in range(64)]
    work = run_spans([Span(rows, i, 1, 9, NEVER) for i, rows in enumerate(slots)], 64)
    assert work.paths == ("conditional",)
    assert len(work._groups) == 1


def test_a_long_prefill_beside_decodes_is_a_group_of_its_own() -> None:
    spans = [Span(KINDS[0], 0, 1, 9, 3), Span(KINDS[2], 1, 3 * LONG_ROWS, 0, NEVER), Span(KINDS[1], 70, 2, 5, NEVER)]
    assert len(run_spans(spans, 80)._groups) == 2


def test_a_gate_opens_across_the_slots_of_one_request() -> None:
    """A window of another edit cuts a request in three slots: the gate that opened in the first is open in the others."""
    onward = Onward(CPU)
    gate = conditional(1, 0).conditional
    assert gate is not None
    watch = Watch(0, Gate("b", 0, 2.0, "onward"), EVERYWHERE, False)
    e_KD = torch.zeros(1, D)
    e_KD[0, 0] = 1.0
    rows = Rows(torch.ones(1), torch.zeros(1), torch.zeros(1, D), torch.zeros(1), torch.zeros(1), torch.ones(1, D))
    yes, no = torch.tensor([True]), torch.tensor([False])
    opens = Conditional(rows, e_KD, torch.zeros(1), torch.tensor([2.0]), yes, no, (watch,), False)
    one, two = SlotRows(None, None, (), opens), SlotRows(torch.zeros(D), None, (), opens)
    entry = (onward.take([watch])[watch],)
    hidden = torch.zeros(30, D)
    hidden[4, 0] = 3.0
    pieces = [Piece(one, 0, 3, entry), Piece(two, 3, 6, entry), Piece(one, 6, 30, entry)]
    tokens = Tokens(torch.zeros(30, dtype=torch.bool), torch.arange(100, 130))
    seen = LayerWork(pieces, CPU).apply(hidden, None, tokens, onward)
    assert seen.flags_N is not None
    assert seen.flags_N.tolist() == [0] * 4 + [GATE] * 26
    assert int(onward.opened_S[entry[0]]) == 104


def test_entries_are_taken_once_and_given_back() -> None:
    onward = Onward(CPU)
    watches = [Watch(0, Gate("b", i, 0.0, "onward"), EVERYWHERE, False) for i in range(200)]
    taken = onward.take(watches)
    assert len({*taken.values()}) == 200
    assert 0 not in taken.values()
    assert len(onward.opened_S) > 200
    onward.opened_S[list(taken.values())] = 5
    onward.give(taken.values())
    again = onward.take(watches)
    assert {*again.values()} == {*taken.values()}
    assert (onward.opened_S == NEVER).all()
