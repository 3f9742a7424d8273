"""The statistics against published implementations, and against what they promise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.monte_carlo import whole
from tests.monte_carlo.page import BOUNDS, within
from tests.monte_carlo.sample_ratio import alarms
from tests.monte_carlo.watched import KINDS, watch
from trimtab.server.experiments.analysis import holm
from trimtab.server.experiments.effect import sequence
from trimtab.server.experiments.sequences import (
    Moments,
    bound,
    difference,
    half_width,
    p_value,
    power,
    rho_for,
    sample_ratio_p,
    units_needed,
)
from trimtab.server.experiments.values import adjusted, floored, moments, ratio_values

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
DATA = {key: [np.array(values) for values in arms] for key, arms in GOLDEN["data"].items()}


def arms_of(kind: str) -> tuple[Moments, Moments]:
    match kind:
        case "ratio":
            values = [ratio_values(num, den) for num, den in zip(DATA["num"], DATA["den"], strict=True)]
        case "adjusted":
            y = adjusted(np.concatenate(DATA["y"]), np.concatenate(DATA["x"]))
            values = [y[:60], y[60:]]
        case _:
            values = DATA["y"]
    return moments(values[0]), moments(values[1])


@pytest.mark.parametrize("kind", ["mean", "ratio", "adjusted"])
def test_sequences_equal_growthbooks_engine(kind: str) -> None:
    control, treated = arms_of(kind)
    estimate, error = difference(control, treated)
    rho, n = rho_for(5000, 0.05), control.n + treated.n
    width = half_width(error, n, 0.05, rho)
    ours = {
        "estimate": estimate,
        "low": estimate - width,
        "high": estimate + width,
        "p": p_value(estimate, error, n, rho),
    }
    assert ours == pytest.approx(GOLDEN["growthbook"][kind], rel=1e-9)


@pytest.mark.parametrize("kind", ["mean", "ratio", "adjusted"])
def test_estimates_and_errors_equal_tea_tastings(kind: str) -> None:
    estimate, error = difference(*arms_of(kind))
    assert {"estimate": estimate, "error": error} == pytest.approx(GOLDEN["tea_tasting"][kind], rel=1e-9)


def test_one_sided_sequences_and_power_equal_growthbooks_engine() -> None:
    golden = GOLDEN["growthbook_repository"]
    estimate, error = difference(*arms_of("mean"))
    width = bound(error, 130, 0.05, rho_for(5000, 2 * 0.05))
    assert [estimate - width, estimate + width] == pytest.approx([golden["low"], golden["high"]], rel=1e-9)
    ours = [power(error**2 * 130, 0.5, n, 0.05, rho_for(5000, 0.05)) for n in (130, 1300)]
    assert ours == pytest.approx(golden["power"], rel=1e-9)


def test_holms_procedure_equals_tea_tastings() -> None:
    p, corrected = GOLDEN["tea_tasting"]["holm"]
    assert holm(p) == pytest.approx(corrected, rel=1e-9)


def test_the_sample_ratio_test_equals_ssrm_test() -> None:
    golden = GOLDEN["growthbook"]["sample_ratio"]
    so_far = np.cumsum(golden["counts"], 0)
    ours = [float(sample_ratio_p([counts], [[0.5, 0.5]])) for counts in so_far]
    assert np.minimum.accumulate(ours) == pytest.approx(golden["p"], rel=1e-9)


def test_stretches_of_equal_shares_are_one_stretch() -> None:
    apart = sample_ratio_p([[530, 470], [510, 490]], [[0.5, 0.5], [0.5, 0.5]])
    assert apart == pytest.approx(float(sample_ratio_p([[1040, 960]], [[0.5, 0.5]])))


def test_a_p_value_is_alpha_exactly_where_the_sequence_touches_zero() -> None:
    rho = rho_for(5000, 0.05)
    for n in (100, 5000, 10**6):
        assert float(p_value(half_width(0.3, n, 0.05, rho), 0.3, n, rho)) == pytest.approx(0.05)


def test_the_one_sided_sequence_is_narrower() -> None:
    rho = rho_for(5000, 0.05)
    assert all(bound(1.0, n, 0.05, rho) < half_width(1.0, n, 0.05, rho) for n in (100, 1000, 10**5))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "late"])
def test_a_thousand_experiments_without_effect_watched_forty_times_err_less_than_alpha(kind: str) -> None:
    """At most 5 % plus three standard errors of the Monte Carlo itself; the z-test shows that watching is what costs."""
    watched = watch(kind, n_runs=1000, seed=1)
    assert within(watched.two_sided, 0.05, 1000)
    assert within(watched.one_sided, 0.05, 1000)
    assert watched.z_test > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_effect_is_found_and_its_size_stays_in_the_sequence(kind: str) -> None:
    watched = watch(kind, effect=KINDS[kind].effect, n_runs=200)
    assert watched.two_sided > 0.6
    assert within(watched.missed, 0.05, 200)


def test_whole_experiments_without_effect_conclude_nothing() -> None:
    """A few; `make monte-carlo` runs a thousand."""
    *_, found = whole.errors(8)
    assert all(within(n / 8, BOUNDS[kind], 8) for kind, n in found.items())


def test_an_injected_53_47_split_is_caught_and_an_honest_one_is_not() -> None:
    caught = alarms(0.53)
    assert caught.share == 1.0
    assert caught.units < 10_000
    assert within(alarms(0.5).share, 0.01, 1000)


def test_the_units_needed_give_the_power_asked_for() -> None:
    rng, rho, effect = np.random.default_rng(0), rho_for(5000, 0.05), 0.2
    n = units_needed(4.0, effect, 0.05, rho)  # σ² = 4: two arms of variance 1
    estimates = rng.normal(effect, (4.0 / n) ** 0.5, 20_000)
    found = np.mean(estimates > half_width((4.0 / n) ** 0.5, n, 0.05, rho))
    assert found == pytest.approx(0.8, abs=0.02)


def test_a_covariate_that_explains_half_narrows_the_sequence_and_leaves_the_effect() -> None:
    rng = np.random.default_rng(0)
    arm = np.repeat([0, 1], 4000)
    x = rng.normal(size=8000)
    y = x + rng.normal(size=8000) + 0.3 * arm
    z = adjusted(y, x)
    plain, narrow = (difference(moments(v[arm == 0]), moments(v[arm == 1])) for v in (y, z))
    assert narrow[1] / plain[1] == pytest.approx(0.5**0.5, rel=0.03)
    assert abs(narrow[0] - 0.3) < 3 * narrow[1]


def test_an_arm_where_a_harm_always_happens_is_told_from_one_where_it_never_does() -> None:
    """Symptom: neither has a variance, so that an over-steered arm was never rolled back."""
    for value in (1.0, 0.1):
        found = sequence(*floored(moments(np.zeros(80)), moments(np.full(80, value))), 5000, 0.05)
        assert found.low > 0
    alike = sequence(*floored(moments(np.full(80, 0.1)), moments(np.full(80, 0.1))), 5000, 0.05)
    assert np.isinf(alike.low)


def test_a_covariate_that_some_units_lack_is_used_of_the_others_alone() -> None:
    y, x = np.array([1.0, 2.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0, np.nan])
    assert adjusted(y, x)[3] == 9.0
    assert adjusted(y, x)[:3] == pytest.approx(adjusted(y[:3], x[:3]))
    assert adjusted(y, np.full(4, np.nan)) is y


@pytest.mark.parametrize("values", [[], [1.0]])
def test_an_arm_of_fewer_than_two_units_has_no_variance(values: list[float]) -> None:
    assert np.isnan(moments(np.array(values)).variance)


def test_a_ratio_over_nothing_is_not_a_number() -> None:
    zeros: Any = np.zeros(3)
    assert np.isnan(ratio_values(zeros, zeros)).all()
