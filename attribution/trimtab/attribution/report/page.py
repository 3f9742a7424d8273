"""The HTML of a report: one file, no script, nothing fetched."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimtab.attribution.report.plots import baseline_plot, dose_plot, fidelity_plot

__all__ = ["page"]


def page(report: dict[str, Any]) -> str:
    """The page of a `document`."""
    environment = Environment(
        loader=PackageLoader("trimtab.attribution.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    base, fidelity = report["unsteered"], report["provenance"].get("fidelity")
    away = [d for d in report["baselines"] if d["strength"] >= 0]
    plots = {
        "baselines": baseline_plot(away) if away else "",
        "doses": {c["latent"]: dose_plot(c["doses"], base) for c in report["cards"] if c["doses"]},
        "fidelity": fidelity_plot(fidelity) if isinstance(fidelity, dict) and fidelity.get("points") else "",
    }
    of_bundle = {card["latent"] for card in report["cards"]}
    words = {"pct": _percent, "points": _points, "nats": _nats, "pm": _plus_minus}
    return environment.get_template("page.html.j2").render(r=report, plots=plots, of_bundle=of_bundle, **words)


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _points(e: dict[str, Any]) -> str:
    interval = "" if e["low"] is None else f" [{100 * e['low']:+.0f}, {100 * e['high']:+.0f}]"
    return f"{100 * e['mean']:+.0f}{interval}"


def _nats(e: dict[str, Any]) -> str:
    return f"{e['mean']:+.3f}" + ("" if e["low"] is None else f" [{e['low']:+.3f}, {e['high']:+.3f}]")


def _plus_minus(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:+.4f}" if error is None else f"{value:+.4f} ± {error:.4f}"
