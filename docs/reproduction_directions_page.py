"""What the directions of one length have to say on docs/reproduction.md: of build/reproduce/*.directions.* alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from docs import reproduction_directions as run
from docs.reproduction import CONFIRMS, Behaviour
from trimtab.attribution.trial.doses import Estimate, sign_flip_p

TEMPLATE = Path(__file__).parent / "reproduction" / "directions.md.in"
COLORS = {"difference in means": "#6b7280", "gradient": "#3b5bdb", "16": "#0b6e4f"}
Array = np.ndarray[Any, Any]


class Moved(NamedTuple):
    """One behaviour under one direction, a value for each held-out prompt."""

    away_P: Array
    """Change of the rate."""
    towards_P: Array
    margin_P: Array
    """From away to towards, nats per token."""
    incoherent: float
    """Fraction of its replies, the worse way."""

    @property
    def span_P(self) -> Array:
        """From away to towards, of the rate."""
        return self.towards_P - self.away_P


Found = Mapping[str, Moved]
"""By direction."""


def moved(behaviour: Behaviour) -> Found:
    """By direction; empty where replies are missing."""
    shows, broken, margins = run.rates(behaviour, "shows"), run.rates(behaviour, "incoherent"), run.margins(behaviour)
    base = shows.get("unsteered", {}).get("+0", {})
    found: dict[str, Moved] = {}
    for label in (direction.label for direction in run.DIRECTIONS):
        of = [shows.get(label, {}).get(sign, {}) for sign in ("-1", "+1")]
        margin = [margins.get(label, {}).get(sign, {}) for sign in ("-1", "+1")]
        if any(len(values) != len(base) for values in (*of, *margin)) or not base:
            return {}
        away_P, towards_P, margin_away_P, margin_towards_P = (
            np.array([values[key] for key in sorted(base)]) for values in (*of, *margin)
        )
        base_P = np.array([base[key] for key in sorted(base)])
        worse = max(float(np.mean(list(values.values()))) for values in broken[label].values())
        found[label] = Moved(away_P - base_P, towards_P - base_P, margin_towards_P - margin_away_P, worse)
    return found


def section(of: Mapping[str, Found], figure: str) -> str:
    """A table for each behaviour, one of all together that had a part in choosing, and the figure at that address."""
    parts = [TEMPLATE.read_text().format(prompts=run.SIZE.prompts, seeds=run.SEEDS, leaders=run.LEADERS)]
    for name, found in of.items():
        aside = ", which had no part in choosing" if name == CONFIRMS else ""
        parts.append(f"**{name}**{aside} ({len(found[run.REFERENCE.label].away_P)} held-out prompts)\n")
        lines = [
            "| direction | margin | away | towards | from away to towards | incoherent |",
            "|---|---|---|---|---|---|",
        ]
        for label, m in found.items():
            rates = " | ".join(said(Estimate.of(values_P), 100) for values_P in (m.away_P, m.towards_P, m.span_P))
            lines.append(f"| {label} | {said(Estimate.of(m.margin_P), 1)} | {rates} | {100 * m.incoherent:.0f} % |")
        parts.append("\n".join(lines) + "\n")
    parts.append(f"![from away to towards, by direction]({figure})\n")
    lines = ["| direction | from away to towards | beyond the difference in means | p |", "|---|---|---|---|"]
    chosen_of = _choosing(of)
    for label, (span_P, gap_P) in _together(chosen_of).items():
        held = (
            " | | "
            if label == run.REFERENCE.label
            else f" | {said(Estimate.of(gap_P), 100)} | {sign_flip_p(gap_P):.2g} "
        )
        lines.append(f"| {label} | {said(Estimate.of(span_P), 100)}{held}|")
    together = f"**{', '.join(chosen_of)} together** (points of the rate)"
    return "\n".join([*parts, together, "", *lines, ""])


def verdict(of: Mapping[str, Found]) -> str:
    """Which direction moves sampled text furthest; whether that is beyond the difference in means; and whether it is so for the
    behaviour that had no part in choosing it."""
    together = _together(_choosing(of))
    order = sorted(together, key=lambda label: -float(together[label][0].mean()))
    best = next(label for label in order if label != run.REFERENCE.label)
    spans = ", ".join(f"{label} {100 * together[label][0].mean():.1f}" for label in order)
    told = (
        f"**One direction a method, {len(_choosing(of))} behaviours**, points from away to towards: {spans}. Beside the "
        f"difference in means of block {run.HOOK}, *{best}* moves sampled text the furthest, {_beyond(together[best][1])}; "
        f"it is the best of {len(run.DIRECTIONS) - 1}, chosen afterwards."
    )
    if CONFIRMS in of:
        alone = _together({CONFIRMS: of[CONFIRMS]})
        told += (
            f" On *{CONFIRMS}*, which had no part in choosing: {100 * alone[best][0].mean():.1f} points, "
            f"{_beyond(alone[best][1])}."
        )
    return told


def _beyond(gap_P: Array) -> str:
    e = Estimate.of(gap_P)
    word = "further than" if e.low > 0 else "less far than" if e.high < 0 else "not discernibly further than"
    return f"{word} the difference in means ({said(Estimate.of(gap_P), 100)}, p = {sign_flip_p(gap_P):.2g})"


def plot(of: Mapping[str, Found], path: Path) -> None:
    """From away to towards by direction, a panel for each behaviour."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(of), sharey=True, squeeze=False)[0]
    labels = [direction.label for direction in run.DIRECTIONS]
    for axes, (name, found) in zip(panels, of.items(), strict=True):
        for y, label in enumerate(labels):
            e = Estimate.of(100 * found[label].span_P)
            color = next((c for start, c in COLORS.items() if label.startswith(start)), "#16202c")
            color = "#8a929c" if label.endswith("random") else color
            axes.plot([e.low, e.high], [y, y], color=color, linewidth=1.6)
            axes.plot([e.mean], [y], "o", color=color, markersize=5)
        axes.axvline(0, color="#6b7280", linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize=8)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.supxlabel("from away to towards, points of the rate", fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _choosing(of: Mapping[str, Found]) -> dict[str, Found]:
    return {name: found for name, found in of.items() if name != CONFIRMS}


def _together(of: Mapping[str, Found]) -> dict[str, tuple[Array, Array]]:
    """By direction: span, and span beyond the reference, over the prompts of all behaviours."""
    spans = {d.label: np.concatenate([found[d.label].span_P for found in of.values()]) for d in run.DIRECTIONS}
    return {label: (span_P, span_P - spans[run.REFERENCE.label]) for label, span_P in spans.items()}


def said(e: Estimate, scale: float) -> str:
    """A mean and its interval; `scale` 100 makes points of a rate."""
    n = digits(scale)
    return f"{scale * e.mean:+.{n}f} [{scale * e.low:+.{n}f}, {scale * e.high:+.{n}f}]"


def digits(scale: float) -> int:
    """After the decimal point."""
    return 1 if scale == 100 else 3
