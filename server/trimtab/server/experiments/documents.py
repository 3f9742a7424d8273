"""Experiments as JSON shows them; docs/experiments.md has the shapes. Numbers that are not finite are null."""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from trimtab.server.database.database import text_of
from trimtab.server.experiments.analysis import Results, analyse
from trimtab.server.experiments.exposures import DROPPED
from trimtab.server.experiments.lifecycle import Record
from trimtab.server.experiments.looks import Look
from trimtab.server.experiments.measurements import Measured
from trimtab.server.experiments.safety import next_step, problems

__all__ = ["experiment", "health", "looks", "results", "results_of"]

DAY_SECONDS = 86400.0


def experiment(record: Record) -> dict[str, Any]:
    """An experiment as it stands."""
    started = record.started_at
    return {
        "key": record.definition.key,
        "state": record.state,
        "coverage": record.coverage,
        "revision": record.revision,
        "changed_at": text_of(record.changed_at),
        "covered_since": text_of(record.covered_since),
        "started_at": None if started is None else text_of(started),
        "step": record.step,
        "approved": record.approved,
        "plans": dict(record.plans),
        "definition": record.definition.model_dump(mode="json", exclude_none=True),
    }


def results_of(record: Record, measured: Measured, now: datetime) -> Results:
    """The analysis of what was measured."""
    days = None
    if record.started_at is not None:
        end = record.changed_at if record.state in ("stopped", "archived") else max(now, record.started_at)
        days = (end - record.started_at).total_seconds() / DAY_SECONDS
    with np.errstate(invalid="ignore", divide="ignore"):
        return analyse(
            record.definition, measured.units, counts_EK=measured.counts_EK, shares_EK=measured.shares_EK, days=days
        )


def results(record: Record, found: Results, measured: Measured) -> dict[str, Any]:
    """What can be said now."""
    definition = record.definition
    return _finite(
        {
            "key": found.experiment,
            "state": record.state,
            "coverage": record.coverage,
            "revision": record.revision,
            "units": {arm.key: n for arm, n in zip(definition.arms, found.n_units, strict=True)},
            "crossovers": measured.n_crossovers,
            "sample_ratio_p": found.sample_ratio_p,
            "triggered_ratio_p": dict(found.triggered_ratio_p),
            "primary": definition.primary.key,
            "minimum_effect": definition.minimum_effect,
            "alpha": definition.alpha,
            "verdicts": dict(found.verdicts),
            "effects": [one._asdict() for one in found.effects],
            "guardrails": [rail._asdict() for rail in found.guardrails],
            "units_needed": found.units_needed,
            "power": found.power,
            "days_left": found.days_left,
            "over": found.over,
            "notes": list(found.notes),
        }
    )


def looks(record: Record, found: Sequence[Look]) -> dict[str, Any]:
    """The primary metric as units came in."""
    arms = [arm.key for arm in record.definition.arms]
    return _finite(
        {
            "object": "list",
            "data": [
                {
                    "at": look.at,
                    "units": dict(zip(arms, look.n_units, strict=True)),
                    "effects": [one._asdict() for one in look.effects],
                }
                for look in found
            ],
        }
    )


def health(
    record: Record, found: Results, measured: Measured, *, waiting: int, failure: str | None, now: datetime
) -> dict[str, Any]:
    """Whether what is measured can be trusted, and what happens next."""
    definition = record.definition
    tallies = dict(measured.tallies)
    lost = tallies.pop(DROPPED, 0)
    wrong = list(problems(record, found, measured.arms, measured.tallies))
    if failure is not None:
        wrong.append(f"exposures cannot be written at the moment, and wait: {failure}")
    step = next_step(record, found, measured.tallies, now)
    return _finite(
        {
            "key": definition.key,
            "state": record.state,
            "coverage": record.coverage,
            "revision": record.revision,
            "healthy": not wrong,
            "problems": wrong,
            "decisions": tallies,
            "exposures": {
                "written": sum(arm.n_requests for arm in measured.arms),
                "dropped": lost,
                "waiting": waiting,
                "last_at": measured.last_at,
            },
            "arms": [
                {
                    "key": arm.key,
                    "units": counts.n_units,
                    "triggered_units": counts.n_triggered_units,
                    "requests": counts.n_requests,
                    "statuses": dict(counts.statuses),
                }
                for arm, counts in zip(definition.arms, measured.arms, strict=True)
            ],
            "crossovers": measured.n_crossovers,
            "sample_ratio_p": found.sample_ratio_p,
            "next_step": None
            if step is None
            else {
                "coverage": step.coverage,
                "at": text_of(step.at),
                "min_units": step.min_units,
                "waits_for": list(step.waits_for),
            },
        }
    )


def _finite(document: dict[str, Any]) -> dict[str, Any]:
    """The document without what JSON has no number for."""
    return {key: _null(value) for key, value in document.items()}


def _null(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return _finite(value)
        case str():
            return value
        case Sequence():
            return [_null(item) for item in value]
        case _:
            return value
