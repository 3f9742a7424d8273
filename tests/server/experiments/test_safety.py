"""When the server rolls an experiment back, when it ramps it up, and when it does neither."""

import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from tests.server.experiments.examples import HOUR, NOON, experiment
from trimtab.server.experiments.analysis import Results
from trimtab.server.experiments.effect import GuardrailResult
from trimtab.server.experiments.exposures import DROPPED
from trimtab.server.experiments.lifecycle import Record, change, draft
from trimtab.server.experiments.measurements import ArmCounts
from trimtab.server.experiments.safety import ERROR_ALPHA, advise, error_e_value, next_step, problems

RAMP = [
    {"coverage": 0.1, "hold_hours": 2, "min_units": 100},
    {"coverage": 0.5},
    {"coverage": 1.0, "approval": True},
]
FINE = ArmCounts(500, 500, 1000, {"applied": 1000})
RESULTS = Results(
    "calm-replies",
    n_units=(400, 400, 200),
    sample_ratio_p=0.8,
    triggered_ratio_p={},
    effects=(),
    guardrails=(),
    verdicts={},
    units_needed=None,
    power=None,
    days_left=None,
    over=None,
    notes=(),
)


def running(**changes: Any) -> Record:
    record, _ = draft(experiment(ramp=RAMP, **changes), actor="a", reason="r", at=NOON)
    return change(record, "start", actor="a", reason="r", at=NOON)[0]


def arms(**statuses: int) -> tuple[ArmCounts, ...]:
    return FINE, ArmCounts(500, 500, sum(statuses.values()), statuses), FINE


def rail(harm: float, state: Any) -> GuardrailResult:
    return GuardrailResult("rude", "calm", 0.05, harm, harm - 0.01, harm + 0.01, state)


@pytest.mark.parametrize(
    ("found", "statuses", "why"),
    [
        (RESULTS, {"applied": 999, "not_applied": 1}, "1 replies were not steered as asked"),
        (RESULTS, {"applied": 50, "failed": 50}, "50 of 100 requests failed"),
        (RESULTS, {"applied": 50, "failed_open": 50}, "50 of 100 requests failed"),
        (replace(RESULTS, sample_ratio_p=0.001), {"applied": 1000}, "sample ratio mismatch"),
        (
            replace(RESULTS, guardrails=(rail(0.08, "breached"),)),
            {"applied": 1000},
            "guardrail rude: arm calm is worse",
        ),
    ],
)
def test_what_is_harmful_is_rolled_back(found: Results, statuses: dict[str, int], why: str) -> None:
    advice = advise(running(), found, arms(**statuses), {}, NOON)
    assert advice.action == "rollback"
    assert why in advice.reason


@pytest.mark.parametrize(
    ("found", "statuses"),
    [
        (RESULTS, {"applied": 1000}),
        (RESULTS, {"applied": 96, "failed": 4}),
        (RESULTS, {"applied": 1, "failed": 1}),
        (RESULTS, {"applied": 50, "abandoned": 50}),
        (RESULTS, {"applied": 50, "ended": 50}),
        (replace(RESULTS, guardrails=(rail(0.08, "collecting"),)), {"applied": 1000}),
    ],
)
def test_what_may_be_chance_is_not(found: Results, statuses: dict[str, int]) -> None:
    assert advise(running(), found, arms(**statuses), {}, NOON).action is None


def test_a_paused_experiment_is_rolled_back_too_and_a_stopped_one_is_left_alone() -> None:
    paused, _ = change(running(), "pause", actor="a", reason="r", at=NOON)
    stopped, _ = change(paused, "stop", actor="a", reason="r", at=NOON)
    found = replace(RESULTS, sample_ratio_p=0.0)
    assert [advise(record, found, arms(applied=1), {}, NOON).action for record in (paused, stopped)] == [
        "rollback",
        None,
    ]


def test_a_step_waits_for_its_hold_its_units_its_approval_and_for_health() -> None:
    record = running()

    def waits(record: Record, found: Results = RESULTS, tallies: dict[str, int] | None = None, hours: float = 3) -> Any:
        step = next_step(record, found, tallies or {}, NOON + hours * HOUR)
        return None if step is None else (step.coverage, step.waits_for)

    assert waits(record) == (0.5, ())
    assert waits(record, hours=1) == (0.5, ("hold",))
    assert waits(record, replace(RESULTS, n_units=(40, 40, 19))) == (0.5, ("units",))
    assert waits(record, tallies={DROPPED: 1}) == (0.5, ("health",))
    assert waits(change(record, "pause", actor="a", reason="r", at=NOON)[0]) == (0.5, ("paused",))
    second, _ = change(record, "advance", actor="server", reason="r", at=NOON + 3 * HOUR)
    assert waits(second) == (1.0, ("approval",))
    approved, _ = change(second, "approve", actor="ann", reason="r", at=NOON + 3 * HOUR)
    assert waits(approved) == (1.0, ())
    last, _ = change(approved, "advance", actor="server", reason="r", at=NOON + 3 * HOUR)
    assert waits(last) is None
    assert waits(change(record, "ramp", actor="a", reason="r", at=NOON, coverage=0.2)[0]) is None


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("conclusive", "the stop rule: conclusive; calm is better, prompt has no effect of the minimum size"),
        ("max_units", "the stop rule: 1,000 units were exposed, max_units is 900"),
        ("max_days", "the stop rule: max_days (30) are over"),
    ],
)
def test_an_automatic_stop_rule_stops_with_its_reason_and_any_other_only_tells(over: Any, said: str) -> None:
    rule = {"max_units": 900, "max_days": 30}
    found = replace(RESULTS, over=over, verdicts={"calm": "better", "prompt": "no_effect"})
    paused, _ = change(running(stop=rule | {"automatic": True}), "pause", actor="a", reason="r", at=NOON)
    for record in (running(stop=rule | {"automatic": True}), paused):
        advice = advise(record, found, arms(applied=1000), {}, NOON + 3 * HOUR)
        assert (advice.action, advice.reason) == ("stop", said)
        assert advise(record, replace(found, over=None), arms(applied=1000), {}, NOON).action is None
        assert advise(record, found, arms(not_applied=1), {}, NOON).action == "rollback"
    assert advise(running(stop=rule), found, arms(applied=1000), {}, NOON + 3 * HOUR).action == "advance"


def test_a_step_that_waits_for_nothing_is_taken() -> None:
    advice = advise(running(), RESULTS, arms(applied=1000), {}, NOON + 3 * HOUR)
    assert (advice.action, advice.reason) == ("advance", "the ramp schedule: coverage 0.1 → 0.5")


def test_a_clock_that_steps_back_makes_a_hold_longer() -> None:
    assert advise(running(), RESULTS, arms(applied=1000), {}, NOON - timedelta(days=30)).action is None


def test_lost_exposures_are_a_problem_that_holds_the_ramp_and_rolls_nothing_back() -> None:
    tallies = {DROPPED: 3}
    assert problems(running(), RESULTS, arms(applied=10), tallies) == (
        "3 exposures were lost: what was measured is not whole",
    )
    assert advise(running(), RESULTS, arms(applied=10), tallies, NOON + 3 * HOUR).action is None


def test_arms_that_fail_as_often_as_tolerated_are_seldom_rolled_back_however_often_one_looks() -> None:
    rng = np.random.default_rng(0)
    rolled = 0
    for _ in range(300):
        failed = np.cumsum(rng.random(400) < 0.05)
        rolled += any(error_e_value(int(failed[n - 1]), n, 0.05) >= 1 / ERROR_ALPHA for n in range(10, 401, 10))
    assert rolled <= 2


def test_the_evidence_is_finite_or_infinite_but_a_number() -> None:
    assert error_e_value(0, 0, 0.05) == error_e_value(5, 5, 1.0) == error_e_value(0, 9, 0.0) == 1.0
    assert error_e_value(1, 9, 0.0) == math.inf
    assert error_e_value(100_000, 100_000, 0.05) > 1e300
    assert 0 <= error_e_value(0, 100_000, 0.05) < 1e-3
