"""What is concluded from units, and when nothing is."""

import math
from typing import Any

import numpy as np
import pytest

from tests.server.experiments.examples import HARM, experiment
from trimtab.server.experiments.analysis import Results, analyse, holm
from trimtab.server.experiments.assignment import shares
from trimtab.server.experiments.effect import MIN_UNITS
from trimtab.server.experiments.sample import Units

TURNS = {"key": "turns", "outcome": "turns"}
RUDE = {"key": "rude", "outcome": "rude", "kind": "proportion", "direction": "decrease"}
RAIL: dict[str, Any] = {"guardrails": [{"metric": RUDE, "margin": 0.05}]}


def units(rates: dict[str, tuple[float, ...]], n: int = 2000, seed: int = 0) -> Units:
    """Outcomes 0 or 1 at a rate per arm, arms control, calm, prompt at 0.4, 0.4, 0.2."""
    rng = np.random.default_rng(seed)
    arm_U = np.repeat([0, 1, 2], [2 * n // 5, 2 * n // 5, n // 5])
    outcomes = {key: (rng.random(len(arm_U)) < np.array(rate)[arm_U]).astype(float) for key, rate in rates.items()}
    return rows(arm_U, outcomes)


def rows(arm_U: Any, outcomes: Any, triggered_U: Any = None, complied_U: Any = None, covariates: Any = None) -> Units:
    """Units that all triggered and complied, if nothing else is said."""
    triggered_U = arm_U >= 0 if triggered_U is None else triggered_U
    complied_U = arm_U >= 0 if complied_U is None else complied_U
    return Units(arm_U, triggered_U, complied_U, outcomes, covariates or {})


def results(of: Units, counts: list[int] | None = None, days: float | None = None, **changes: Any) -> Results:
    definition = experiment(**changes)
    given = counts or [int((of.arm_U == arm).sum()) for arm in range(3)]
    return analyse(definition, of, counts_EK=[given], shares_EK=[shares(definition, 1.0)], days=days)


def test_a_large_effect_is_better_and_no_effect_is_still_collecting() -> None:
    found = results(units({"harm": (0.3, 0.15, 0.3)}))
    assert found.verdicts == {"calm": "better", "prompt": "collecting"}
    assert found.effects[0].high < 0


def test_the_direction_of_the_metric_decides_what_better_is() -> None:
    found = results(units({"harm": (0.3, 0.15, 0.3)}), primary={**HARM, "direction": "increase"})
    assert found.verdicts["calm"] == "worse"


def test_an_effect_smaller_than_the_minimum_is_no_effect() -> None:
    found = results(units({"harm": (0.3, 0.3, 0.3)}, n=40_000), minimum_effect=0.05)
    assert set(found.verdicts.values()) == {"no_effect"}


def test_a_sample_ratio_mismatch_makes_every_verdict_invalid() -> None:
    found = results(units({"harm": (0.3, 0.1, 0.3)}), counts=[4700, 5300, 2500])
    assert set(found.verdicts.values()) == {"invalid"}
    assert "sample ratio mismatch" in found.notes[0]


def test_too_few_units_and_an_outcome_that_never_happened_have_no_bounds() -> None:
    few = results(units({"harm": (0.3, 0.3, 0.3)}, n=MIN_UNITS * 2))
    never = results(units({"harm": (0.0, 0.0, 0.0)}))
    nobody = results(rows(np.zeros(0, int), {}))
    for found in (few, never, nobody):
        assert set(found.verdicts.values()) == {"collecting"}
        assert found.units_needed is None
        assert all(math.isinf(one.low) and math.isinf(one.high) and one.p == 1 for one in found.effects)


@pytest.mark.parametrize(
    ("rates", "state"),
    [((0.05, 0.3, 0.05), "breached"), ((0.05, 0.05, 0.05), "safe"), ((0.05, 0.1, 0.1), "collecting")],
)
def test_a_guardrail_is_safe_breached_or_still_collecting(rates: tuple[float, ...], state: str) -> None:
    found = results(units({"harm": (0.3, 0.3, 0.3), "rude": rates}, n=5000), **RAIL)
    assert found.guardrails[0].state == state


def test_triggered_units_are_compared_with_triggered_units() -> None:
    """An effect on the tenth that triggers is diluted in intent to treat and whole among the triggered."""
    base = units({"harm": (0.5, 0.5, 0.5)}, n=20_000)
    rng = np.random.default_rng(1)
    triggered = rng.random(len(base.arm_U)) < 0.1
    harm = np.where(triggered & (base.arm_U == 1), 0.0, base.outcomes["harm"])
    found = results(rows(base.arm_U, {"harm": harm}, triggered_U=triggered))
    effects = {one.population: one for one in found.effects if one.arm == "calm"}
    assert effects["triggered"].estimate == pytest.approx(-0.5, abs=0.05)
    assert effects["intent_to_treat"].estimate == pytest.approx(-0.05, abs=0.02)
    assert effects["triggered"].n_treated == int((triggered & (base.arm_U == 1)).sum())


def test_triggered_units_out_of_proportion_are_noted_and_leave_intent_to_treat_alone() -> None:
    """What steering itself makes fire is no fair comparison."""
    base = units({"harm": (0.3, 0.3, 0.3)}, n=10_000)
    triggered = np.random.default_rng(1).random(10_000) < np.array([0.2, 0.3, 0.2])[base.arm_U]
    found = results(rows(base.arm_U, base.outcomes, triggered_U=triggered))
    assert found.triggered_ratio_p["calm"] < 0.01 < found.triggered_ratio_p["prompt"]
    assert [note for note in found.notes if "triggered" in note] == list(found.notes)
    assert "invalid" not in found.verdicts.values()


def test_an_outcome_that_is_reported_less_in_one_arm_is_noted() -> None:
    base = units({"harm": (0.3, 0.3, 0.3)}, n=5000)
    lost = np.random.default_rng(1).random(5000) < np.array([0.0, 0.3, 0.0])[base.arm_U]
    found = results(rows(base.arm_U, {"harm": np.where(lost, np.nan, base.outcomes["harm"])}))
    assert len(found.notes) == 1
    assert "'harm' is reported of" in found.notes[0]
    assert "'calm'" in found.notes[0]


def test_a_covariate_narrows_the_sequence_of_its_metric() -> None:
    rng = np.random.default_rng(0)
    base = units({}, n=4000)
    before = rng.normal(size=4000)
    outcomes = {"length": before + 0.5 * rng.normal(size=4000)}
    widths = []
    for covariate in ({}, {"covariate": "length"}):
        primary = {"key": "length", "outcome": "length", **covariate}
        found = results(rows(base.arm_U, outcomes, covariates={"length": before}), primary=primary)
        widths.append(found.effects[0].high - found.effects[0].low)
    assert widths[1] / widths[0] == pytest.approx(0.5 / 1.25**0.5, rel=0.05)


def test_an_arm_that_is_always_harmful_beside_a_control_that_never_is_breaches_a_guardrail() -> None:
    """Symptom: neither arm had a variance, so that the sequence of an over-steered arm never began."""
    found = results(units({"harm": (0.3, 0.3, 0.3), "rude": (0.0, 1.0, 0.0)}, n=200), **RAIL)
    assert [rail.state for rail in found.guardrails] == ["breached", "collecting"]


def test_power_grows_with_the_minimum_effect_and_says_what_the_planned_units_are_good_for() -> None:
    small, large = (results(units({"harm": (0.3, 0.3, 0.3)}), minimum_effect=size) for size in (0.02, 0.1))
    assert small.power is not None
    assert large.power is not None
    assert small.power < 0.2 < 0.95 < large.power


def test_failed_open_units_stay_in_intent_to_treat_and_leave_per_protocol() -> None:
    base = units({"harm": (0.3, 0.2, 0.3)})
    complied = np.arange(len(base.arm_U)) % 4 != 0
    found = results(rows(base.arm_U, base.outcomes, complied_U=complied))
    effects = {one.population: one for one in found.effects if one.arm == "calm"}
    assert effects["intent_to_treat"].n_treated == 800
    assert effects["per_protocol"].n_treated == 600


def test_holm_adjusts_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_secondary_metrics_are_corrected_together() -> None:
    of = units({"harm": (0.3, 0.3, 0.3), "turns": (0.5, 0.6, 0.5)})
    alone = results(of, secondary=[TURNS])
    among = results(of, secondary=[TURNS, *({"key": f"m{n}", "outcome": f"m{n}"} for n in range(8))])
    p = [next(one.p for one in found.effects if (one.metric, one.arm) == ("turns", "calm")) for found in (alone, among)]
    assert p[0] < p[1]


def test_days_left_shrink_as_units_arrive() -> None:
    early, late = (results(units({"harm": (0.3, 0.3, 0.3)}, n=n), days=n / 1000) for n in (2000, 8000))
    assert early.days_left is not None
    assert late.days_left is not None
    assert 0 < late.days_left < early.days_left


def test_days_left_end_with_the_stop_rule() -> None:
    of = units({"harm": (0.3, 0.3, 0.3)}, n=2000)
    by_days = results(of, days=2, stop={"max_days": 3})
    by_units = results(of, days=2, stop={"when": "horizon", "max_units": 2500})
    over = results(of, days=2, stop={"max_days": 1})
    assert (by_days.days_left, by_units.days_left, over.days_left) == (1.0, 0.5, 0.0)
    assert (by_days.over, by_units.over, over.over) == (None, None, "max_days")


def test_an_experiment_is_over_once_every_arm_is_decided_or_its_units_are_in() -> None:
    decided, open_ = units({"harm": (0.4, 0.2, 0.2)}, n=5000), units({"harm": (0.4, 0.2, 0.4)}, n=5000)
    assert results(decided).over == "conclusive"
    assert results(open_).over is None
    assert results(decided, stop={"when": "horizon", "max_units": 9000}).over is None
    assert results(open_, stop={"max_units": 5000}).over == "max_units"
    assert results(decided, stop={"min_units": 6000}).verdicts["calm"] == "collecting"
