"""The report of an experiment: one HTML file, no script, nothing fetched (`pip install 'trimtab[reports]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimtab.client.experiment_plots import forest_plot, sequence_plot
from trimtab.client.experiments import Experiment, ExperimentHealth, ExperimentResults, Look

__all__ = ["document", "page"]


def document(
    experiment: Experiment, health: ExperimentHealth, results: ExperimentResults, looks: Sequence[Look]
) -> dict[str, Any]:
    """What a report says, as JSON: every number in the page is in here."""
    return {
        "format": "trimtab.experiment_report",
        "version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": _summary(experiment, results),
        "definition": dict(experiment.definition),
        "state": experiment.state,
        "coverage": experiment.coverage,
        "started_at": None if experiment.started_at is None else experiment.started_at.isoformat(),
        "history": [asdict(change) | {"at": change.at.isoformat()} for change in experiment.history],
        "healthy": health.healthy,
        "problems": list(health.problems),
        "arms": [
            {"key": a.key, "units": a.units, "triggered_units": a.triggered_units, "requests": a.requests,
             "statuses": dict(a.statuses)}
            for a in health.arms
        ],
        "exposures": {"written": health.written, "dropped": health.dropped},
        "decisions": dict(health.decisions),
        "results": dict(results.document),
        "looks": [
            {"at": look.at.isoformat(), "units": dict(look.units), "effects": [asdict(one) for one in look.effects]}
            for look in looks
        ],
    }  # fmt: skip


def page(report: Mapping[str, Any]) -> str:
    """The HTML of a `document`."""
    environment = Environment(
        loader=PackageLoader("trimtab.client", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    results = report["results"]
    effects = [e for e in results["effects"] if e["population"] == "intent_to_treat" and e["low"] is not None]
    secondary = [e for e in effects if e["metric"] != results["primary"]]
    rails = [rail for rail in results["guardrails"] if rail["low"] is not None]
    plots: dict[str, list[str]] = {
        "sequences": [
            sequence_plot(report["looks"], arm, results["minimum_effect"], f"{results['primary']}: {arm} − control")
            for arm in results["verdicts"]
        ],
        "secondary": [
            forest_plot(
                [(e["arm"], e["estimate"], e["low"], e["high"]) for e in of_metric],
                [None] * len(of_metric),
                f"{metric}: difference to the control",
            )
            for metric, of_metric in _by_metric(secondary)
        ],
        "guardrails": [
            forest_plot(
                [(rail["arm"], rail["harm"], rail["low"], rail["high"]) for rail in of_metric],
                [rail["margin"] for rail in of_metric],
                f"{metric}: worse than the control by; the mark is what is tolerated",
            )
            for metric, of_metric in _by_metric(rails)
        ],
    }
    template = environment.get_template("experiment_report.html.j2")
    return template.render(r=report, plots=plots, number=_number, interval=_interval, count="{:,}".format)


def _by_metric(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of each metric apart, as each has a unit of its own, in the order of their first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["metric"], []).append(row)
    return list(found.items())


def _summary(experiment: Experiment, results: ExperimentResults) -> list[str]:
    """The findings in sentences."""
    words = {
        "better": "is better than the control",
        "worse": "is worse than the control",
        "no_effect": f"does not differ from the control by {results.minimum_effect:g} or more",
        "collecting": "cannot be told from the control yet",
        "invalid": "cannot be judged: the units are not split as they should be",
    }
    lines = []
    for arm, verdict in results.verdicts.items():
        one = results.effect(arm)
        found = (
            ""
            if one.estimate is None
            else f": {_number(one.control)} → {_number(one.treated)}, {_interval(asdict(one))}"
        )
        lines.append(
            f"{arm} {words[verdict]} on {results.primary}{found} ({one.n_control:,} and {one.n_treated:,} units)."
        )
    for rail in results.guardrails:
        if rail.state == "breached" and rail.harm is not None and rail.low is not None:
            lines.append(
                f"{rail.arm} breaches the guardrail {rail.metric}: worse by {rail.harm:.3g}, at least {rail.low:.3g}, where "
                f"{rail.margin:g} is tolerated."
            )
    last = experiment.history[-1] if experiment.history else None
    if experiment.is_over and last is not None:
        lines.append(f"It is over: {last.action} by {last.actor}, {last.reason}.")
    elif results.over is not None:
        lines.append(f"Its stop rule is met ({results.over}).")
    elif results.days_left is not None:
        lines.append(f"At the present pace {results.days_left:.1f} days are left.")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(one: Mapping[str, Any], estimate: str = "estimate") -> str:
    if one[estimate] is None:
        return "–"
    bounds = "" if one["low"] is None or one["high"] is None else f" [{one['low']:+.3g}, {one['high']:+.3g}]"
    return f"{one[estimate]:+.3g}{bounds}"
