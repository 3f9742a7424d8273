"""Intervals and p-values over pairs, clustered by prompt."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.attribution.uncertainty import clustered_se, uncertainty


def test_pairs_of_one_prompt_are_one_cluster() -> None:
    values = torch.tensor([[1.0], [3.0], [1.0], [3.0]])
    independent = clustered_se(values, ["a", "b", "c", "d"])
    assert float(independent) == pytest.approx(math.sqrt(4 * 4 / 3) / 4)
    assert float(clustered_se(values, ["a", "b", "a", "b"])) == pytest.approx(math.sqrt(8 * 2) / 4)
    assert float(clustered_se(values, ["a", "a", "b", "b"])) == 0.0


def test_the_bootstrap_agrees_with_the_normal_interval_where_that_holds() -> None:
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) + 0.3
    found = uncertainty(values, [str(i) for i in range(400)])
    half = 1.96 * float(found.se_C)
    assert float(found.low_C) == pytest.approx(float(values.mean()) - half, abs=0.2 * half)
    assert float(found.high_C) == pytest.approx(float(values.mean()) + half, abs=0.2 * half)


def test_copies_of_a_prompt_make_nothing_surer() -> None:
    values = torch.randn(20, 1, generator=torch.Generator().manual_seed(1)) + 0.4
    once = uncertainty(values, [str(i) for i in range(20)])
    fivefold = uncertainty(values.repeat_interleave(5, 0), [str(i) for i in range(20) for _ in range(5)])
    for one, five in zip(once, fivefold, strict=True):
        torch.testing.assert_close(one, five)


def test_with_three_prompts_no_p_value_is_below_a_quarter() -> None:
    """Of the 8 patterns of signs, 2 are as far from 0 as three alike ones."""
    found = uncertainty(torch.tensor([[1.0], [1.1], [0.9]]), ["a", "b", "c"])
    assert float(found.p_C) == pytest.approx(0.25, abs=0.03)


def test_p_values_under_the_null_are_uniform_and_the_family_is_rarely_wrong() -> None:
    generator = torch.Generator().manual_seed(2)
    tables = [
        uncertainty(torch.randn(24, 20, generator=generator), [str(i) for i in range(24)], resamples=400, seed=i)
        for i in range(60)
    ]
    p = torch.cat([found.p_C for found in tables])
    for level in (0.05, 0.2, 0.5):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=0.04)
    false_finds = sum(bool((found.p_family_C <= 0.1).any()) for found in tables)
    assert false_finds <= 12  # 6 of 60 are expected; 13 happen once in 200 such tests.


def test_an_effect_is_found_among_many() -> None:
    values = torch.randn(40, 200, generator=torch.Generator().manual_seed(3))
    values[:, 17] += 1.2
    found = uncertainty(values, [str(i) for i in range(40)])
    assert (found.p_family_C < 0.05).nonzero().squeeze(1).tolist() == [17]
    assert float(found.low_C[17]) > 0
