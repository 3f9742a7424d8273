"""The figures of an experiment's report, as SVG text that stands in the page (`pip install 'trimtab[reports]'`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["forest_plot", "sequence_plot"]

INK, BETTER, WORSE, QUIET = "#16202c", "#0b6e4f", "#b3261e", "#6b7280"


def sequence_plot(looks: Sequence[Mapping[str, Any]], arm: str, minimum: float, title: str) -> str:
    """The difference on the primary metric by units so far, with its sequence: it narrows, and holds at every look."""
    figure = Figure(figsize=(6.2, 3.0), layout="constrained")
    axes = figure.subplots()
    rows = [one for look in looks for one in look["effects"] if one["arm"] == arm and one["estimate"] is not None]
    known = [one for one in rows if one["low"] is not None and one["high"] is not None]
    axes.axhline(0.0, color=INK, linewidth=0.8)
    for end in (-minimum, minimum):
        axes.axhline(end, color=QUIET, linewidth=0.8, linestyle=":")
    axes.fill_between(
        [_units(one) for one in known],
        [one["low"] for one in known],
        [one["high"] for one in known],
        color=BETTER,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(
        [_units(one) for one in rows],
        [one["estimate"] for one in rows],
        "o-",
        color=BETTER,
        linewidth=1.3,
        markersize=3,
    )
    axes.set_title(title, fontsize=9, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("units in the two arms", fontsize=8)
    axes.set_ylabel("difference to the control", fontsize=8)
    return _svg(figure, axes)


def forest_plot(rows: Sequence[tuple[str, float, float, float]], marks: Sequence[float | None], label: str) -> str:
    """One line for each (name, estimate, low, high), and a mark on it where one is given (a margin)."""
    figure = Figure(figsize=(6.2, 0.7 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.0, color=INK, linewidth=0.8)
    for y, ((_, estimate, low, high), mark) in enumerate(zip(rows, marks, strict=True)):
        axes.plot([low, high], [y, y], color=BETTER, linewidth=1.6)
        axes.plot([estimate], [y], "o", color=BETTER, markersize=4)
        if mark is not None:
            axes.plot([mark], [y], "|", color=WORSE, markersize=12, markeredgewidth=1.6)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.margins(y=0.5 / max(1, len(rows)))
    axes.set_xlabel(label, fontsize=8)
    return _svg(figure, axes)


def _units(one: Mapping[str, Any]) -> int:
    return int(one["n_control"] + one["n_treated"])


def _svg(figure: Figure, axes: Axes) -> str:
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
