"""The figures of a report, as SVG text that stands in the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["baseline_plot", "dose_plot", "fidelity_plot"]

AWAY, TOWARDS, QUIET = "#0b6e4f", "#b3261e", "#6b7280"


def dose_plot(doses: Sequence[dict[str, Any]], unsteered: dict[str, Any]) -> str:
    """The rate of the behaviour by strength with its 95 % band, and beneath it what the text costs."""
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    rate, cost = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    base = float(unsteered["shows"])
    points = sorted([*((d["strength"], d) for d in doses), (0.0, None)], key=lambda point: float(point[0]))
    x = [strength for strength, _ in points]
    mean = [base + (d["effect"]["mean"] if d else 0.0) for _, d in points]
    low = [base + ((d["effect"]["low"] or 0.0) if d else 0.0) for _, d in points]
    high = [base + ((d["effect"]["high"] or 0.0) if d else 0.0) for _, d in points]
    rate.axhline(base, color=QUIET, linewidth=0.8, linestyle=":")
    rate.fill_between(x, low, high, color=AWAY, alpha=0.15, linewidth=0)
    rate.plot(x, mean, color=AWAY, linewidth=1.4)
    for (strength, d), y in zip(points, mean, strict=True):
        safe = d is None or d["safe"]
        rate.plot([strength], [y], "o", color=AWAY, markersize=4.5, markerfacecolor=AWAY if safe else "white")
    rate.set_ylim(-0.05, 1.05)
    rate.set_ylabel("shows it", fontsize=8)
    cost.axhline(0, color=QUIET, linewidth=0.8, linestyle=":")
    cost.plot(x, [d["nats"]["mean"] if d else 0.0 for _, d in points], color=TOWARDS, linewidth=1.2)
    cost.set_ylabel("Δ nats", fontsize=8)
    cost.set_xlabel("strength (hollow: not safe)", fontsize=8)
    return _svg(figure, (rate, cost))


def baseline_plot(doses: Sequence[dict[str, Any]]) -> str:
    """The change of the rate under each arm that acts as a whole, with its 95 % interval."""
    figure = Figure(figsize=(7.2, 0.22 * len(doses) + 0.8), layout="constrained")
    axes = figure.subplots()
    for i, d in enumerate(reversed(doses)):
        e = d["effect"]
        low, high = (e["mean"] if e[end] is None else e[end] for end in ("low", "high"))
        color = AWAY if e["mean"] <= 0 else TOWARDS
        axes.plot([100 * low, 100 * high], [i, i], color=color, linewidth=1.6)
        axes.plot(
            [100 * e["mean"]], [i], "o", color=color, markersize=5, markerfacecolor=color if d["safe"] else "white"
        )
    labels = [f"{d['arm']}, {d['strength']:g}" if d["strength"] else d["arm"] for d in reversed(doses)]
    axes.set_yticks(range(len(doses)), labels, fontsize=8)
    axes.axvline(0, color=QUIET, linewidth=0.8, linestyle=":")
    axes.set_xlabel("change of the rate, points (hollow: the text suffers)", fontsize=8)
    return _svg(figure, (axes,))


def fidelity_plot(fidelity: dict[str, Any]) -> str:
    """Predicted against measured effect of each latent that was measured."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    points = fidelity["points"]
    for leading, label, color in ((True, "leading", AWAY), (False, "random", QUIET)):
        own = [p for p in points if p["leading"] is leading]
        axes.plot(
            [p["predicted"] for p in own], [p["measured"] for p in own], "o", color=color, markersize=4, label=label
        )
    ends = [min(p["predicted"] for p in points), max(p["predicted"] for p in points)]
    axes.plot(ends, ends, color=QUIET, linewidth=0.8, linestyle=":", label="as predicted")
    axes.set_xlabel("predicted, nats per token", fontsize=8)
    axes.set_ylabel("measured", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure, (axes,))


def _svg(figure: Figure, axes: Sequence[Axes]) -> str:
    for one in axes:
        one.tick_params(labelsize=7)
        one.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
