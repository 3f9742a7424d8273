"""What can be written down as an experiment, and what is refused."""

from typing import Any

import pytest

from tests.server.experiments.examples import HARM, experiment, written
from trimtab.server.experiments.definition import parse_experiment
from trimtab.server.experiments.errors import InvalidExperiment

PLAIN = {"key": "control", "weight": 0.5}
CALM = {"key": "calm", "weight": 0.5, "steering": {"bundle": "calm"}}


def test_a_definition_survives_its_own_json() -> None:
    once = experiment(layer={"key": "tone", "start": 0.2, "end": 0.5}, targeting={"tenant": {"$in": ["a", "b"]}})
    assert parse_experiment(once.model_dump(mode="json")) == once


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": [PLAIN, {**CALM, "weight": 0.4}]}, "weights must sum to 1, not 0.9"),
        ({"arms": [{**PLAIN, "weight": 1 / 3}, {**CALM, "weight": 2 / 3}]}, "whole number of ten-thousandths"),
        ({"arms": [PLAIN, {**CALM, "weight": float("nan")}]}, "finite"),
        ({"arms": [PLAIN, {**CALM, "key": "control"}]}, "arms share a key: control"),
        ({"arms": [PLAIN]}, "at least 2"),
        ({"arms": [PLAIN, {"key": "other", "weight": 0.5}]}, "does what the control does"),
        ({"arms": [PLAIN, CALM], "aa": True}, "same treatment in every arm"),
        ({"secondary": [HARM]}, "metrics share a key: harm"),
        ({"guardrails": [{"metric": {"key": "length", "outcome": "length"}, "margin": 0}]}, "greater than 0"),
        ({"primary": {"key": "rate", "kind": "ratio", "outcome": "bad"}}, "denominator"),
        ({"layer": {"key": "tone", "start": 0.5, "end": 0.5}}, "is empty"),
        ({"stop": {"when": "horizon"}}, "`max_units` or `max_days`"),
        ({"ramp": [{"coverage": 0.5}, {"coverage": 0.1}]}, "rising coverage"),
        ({"targeting": {"country": {"$regex": "(a+)+$"}}}, "knows no $regex"),
        ({"targeting": {"$or": [{"country": {"$inn": ["FR"]}}]}}, "knows no $inn"),
        ({"text": {"share": 0.01}}, "experiment.text.days: Field required"),
        ({"text": {"share": 0, "days": 30}}, "greater than 0"),
        ({"text": {"share": 0.01, "days": 366}}, "less than or equal to 365"),
        ({"unit": "device"}, "'user', 'conversation', 'tenant' or 'request'"),
        ({"hypotesis": "typo"}, "unknown field 'hypotesis'"),
        ({"key": "Über"}, "pattern"),
    ],
)
def test_a_definition_that_cannot_be_run_is_refused_with_the_reason(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidExperiment) as refused:
        parse_experiment(written(**changes))
    assert said in refused.value.message


def test_every_violation_is_told_at_once_with_the_path_of_its_field() -> None:
    with pytest.raises(InvalidExperiment) as refused:
        parse_experiment(written(unit="device", alpha=2, arms=[PLAIN, {**CALM, "steering": {"bundel": "calm"}}]))
    fields = {violation.field for violation in refused.value.violations}
    assert {"experiment.unit", "experiment.alpha", "experiment.arms[1].steering.bundel"} <= fields
