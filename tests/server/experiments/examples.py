"""Experiments for the tests."""

from datetime import UTC, datetime, timedelta
from typing import Any

from trimtab.server.experiments.definition import Experiment, parse_experiment
from trimtab.server.experiments.lifecycle import Record, change, draft

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
HARM = {"key": "harm", "outcome": "harm", "kind": "proportion", "direction": "decrease"}


def written(**changes: Any) -> dict[str, Any]:
    """A definition as a caller writes it: control, a bundle and a prompt-only arm."""
    return {
        "key": "calm-replies",
        "hypothesis": "The bundle lowers the share of conversations with a harmful reply.",
        "arms": [
            {"key": "control", "weight": 0.4},
            {"key": "calm", "weight": 0.4, "steering": {"bundle": "calm", "strength": 0.8}},
            {"key": "prompt", "weight": 0.2, "system_prompt": "Stay calm."},
        ],
        "unit": "user",
        "primary": HARM,
        "minimum_effect": 0.02,
        **changes,
    }


def experiment(**changes: Any) -> Experiment:
    """The same, parsed."""
    return parse_experiment(written(**changes))


def running(coverage: float = 1.0, **changes: Any) -> Record:
    """The same, started and ramped."""
    record, _ = draft(experiment(**changes), actor="ann", reason="new", at=NOON)
    record, _ = change(record, "start", actor="ann", reason="go", at=NOON)
    return change(record, "ramp", actor="ann", reason="ramp", at=NOON, coverage=coverage)[0]
