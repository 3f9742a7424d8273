"""docs/reproduction.md and its figures, of whatever the runs have left under build/reproduce."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

from docs import reproduction as run
from docs import reproduction_directions as directions
from docs import reproduction_directions_page as directions_page
from docs import reproduction_planted as planted
from docs import reproduction_planted_page as planted_page
from docs.reproduction_directions_page import digits, said
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.trial.doses import Estimate, sign_flip_p

PAGE, FIGURES = Path("docs/reproduction.md"), Path("docs/reproduction")
COLORS = {
    "planting": "#7b2cbf",
    "Δ-attribution": "#0b6e4f",
    "Δ-activation": "#b3261e",
    "steering gradient": "#3b5bdb",
    "model diffing": "#c77700",
    "random": "#8a929c",
}
FEWEST = 3
"""Prompts, below which nothing is said."""
FEWEST_LEADERS = 8
"""Of each method, below which methods are not compared."""


rcParams["svg.hashsalt"] = "trimtab"  # the same data write the same file


Array = np.ndarray[Any, Any]
Spans = dict[str, dict[str, list[Array]]]
"""Margin or rate → method → of each behaviour: from away to towards, a value for each prompt [P]."""


class Effects(NamedTuple):
    """Effects of directions on prompts: away from the behaviour at sign −1, towards it at +1."""

    unit: str
    of: dict[str, dict[str, dict[str, float]]]
    """Direction → sign → prompt → value."""

    def first(self, entries: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
        """(direction, sign) entries up to the first that was not measured on every prompt."""
        n = max((len(v) for by_sign in self.of.values() for v in by_sign.values()), default=0)
        return list(takewhile(lambda e: [len(v) for v in self.of.get(e[0], {}).values()] == [n, n], entries))

    def values(self, entries: Sequence[tuple[str, float]], towards: bool) -> Array:
        """[direction, prompt] of entries that were measured."""
        keyed = [self.of[name][f"{sign if towards else -sign:+g}"] for name, sign in entries]
        return np.array([[v[prompt] for prompt in sorted(v)] for v in keyed])


def write(behaviours: Sequence[run.Behaviour], size: run.Size) -> None:
    """Write the page and its figures."""
    FIGURES.mkdir(exist_ok=True)
    there = [b for b in behaviours if run.bundle_file(b, size).exists()]
    verdicts: list[str] = []
    spans: Spans = {}
    parts = [_behaviour(behaviour, size, verdicts, spans) for behaviour in there]
    if there:
        whole = {what: of for what, of in spans.items() if len(of["Δ-activation"]) == len(there)}
        verdicts[:0] = [_together(what, len(there), of) for what, of in whole.items()]
        parts += [_shared(there, size)]
    ordered = sorted(run.BEHAVIOURS, key=lambda b: b.name == run.CONFIRMS)
    moved = {b.name: of for b in ordered if directions.there(b) and (of := directions_page.moved(b))}
    if moved.keys() - {run.CONFIRMS}:
        figure = FIGURES / "directions.svg"
        directions_page.plot(moved, figure)
        verdicts.append(directions_page.verdict(moved))
        parts.append(directions_page.section(moved, f"reproduction/{figure.name}"))
    if record := planted.record():
        parts += _planted(record, verdicts)
    found = "## What came out\n\n" + "\n".join(f"- {line}" for line in verdicts) + "\n"
    PAGE.write_text("\n".join([_opening(size), found, _rates(run.BEHAVIOURS), *parts]))


def _planted(record: dict[str, Any], verdicts: list[str]) -> list[str]:
    """The section of the planted causes, and what steering does to each."""
    figure = FIGURES / "planted.ranks.svg"
    if planted_page.there(record):
        planted_page.plot(record, figure)
    parts = [planted_page.section(record, f"reproduction/{figure.name}")]
    for behaviour in (b for b in planted.BEHAVIOURS if b.name in planted_page.there(record)):
        verdicts.append(planted_page.verdict(behaviour.name, record["ranks"][behaviour.name]))
        parts.append(_behaviour(behaviour, planted.SIZE, verdicts, {}))
    return parts


def _opening(size: run.Size) -> str:
    template = (FIGURES / "opening.md.in").read_text()
    return template.format(**vars(size), length=run.LENGTH, controls=run.CONTROLS, seeds=run.SEEDS)


def _rates(behaviours: Sequence[run.Behaviour]) -> str:
    lines = [
        "## Base rates",
        "",
        "| behaviour | samples | shows | lacks | unclear | incoherent | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for b in behaviours:
        file = run.BUILD / f"{b.name}.rates.json"
        if b.name == "pretends-human":
            lines.append(f"| {b.name}: {b.sentence} | 1620 | 22.2 % | 18.1 % | 58.3 % | 1.4 % | 84, shipped |")
        elif file.exists():
            r = json.loads(file.read_text())
            cells = " | ".join(
                f"{r['rates'][k]:.1%}".replace("%", " %") for k in ("shows", "lacks", "unclear", "incoherent")
            )
            lines.append(f"| {b.name}: {b.sentence} | {r['samples']} | {cells} | {r['pairs']} |")
    return "\n".join(lines) + "\n"


def _behaviour(behaviour: run.Behaviour, size: run.Size, verdicts: list[str], spans: Spans) -> str:
    leaders = {m: [(str(latent), sign) for latent, sign in e] for m, e in run.leaders(behaviour, size).items()}
    methods = list(leaders)
    for vector in Bundle.load(run.bundle_file(behaviour, size)).header.vectors:
        leaders[vector.name.replace("_", " ")] = [(vector.name, 1.0)]
    out = [f"## {behaviour.name}: {behaviour.sentence}", ""]
    for what, effects, system in (
        ("margin", Effects("nats per token", run.margins(behaviour, size)), None),
        ("rate", *_rate_effects(behaviour, size)),
    ):
        there = {method: effects.first(entries) for method, entries in leaders.items()}
        k = min(len(there[method]) for method in methods if method != "random")
        values = {(m, t): effects.values(e[:k], t) for m, e in there.items() for t in (False, True)}
        n = min(v.shape[1] if v.size else 0 for v in values.values())
        if n < FEWEST:
            out += [f"*The {what} was not measured.*", ""]
            continue
        scale = 100 if what == "rate" else 1
        out += [
            f"**{what.capitalize()}** ({effects.unit}; {n} held-out prompts)",
            "",
            "| one direction of | n | away | towards | strongest away | strongest towards |",
            "|---|---|---|---|---|---|",
        ]
        for method in leaders:
            away, towards = values[method, False], values[method, True]
            best = " | ".join(f"{scale * x:+.{digits(scale)}f}" for x in (away.mean(1).min(), towards.mean(1).max()))
            cells = " | ".join(said(Estimate.of(v.mean(0)), scale) for v in (away, towards))
            out.append(f"| {method} | {len(away)} | {cells} | {best} |")
        if system is not None:
            out.append(f"| *system message* | | {said(system, scale)} | | | |")
        out.append("")
        span = {m: values[m, True].mean(0) - values[m, False].mean(0) for m in methods}
        for method, span_P in span.items():
            spans.setdefault(what, {}).setdefault(method, []).append(span_P)
        if k >= FEWEST_LEADERS:
            verdicts.append(_verdict(behaviour.name, what, span))
        else:
            dense = {
                m: [said(Estimate.of(values[m, t].mean(0)), scale) for t in (False, True)]
                for m in leaders
                if m not in methods
            }
            moves = "; ".join(f"the {m} {away} away, {towards} towards" for m, (away, towards) in dense.items())
            verdicts.append(f"**{behaviour.name}, {what}**: {moves} ({effects.unit}).")
        figure = f"{behaviour.name}.{what}.svg"
        _figure(leaders, values, effects.unit, scale, FIGURES / figure)
        out += [f"![{behaviour.name}, {what}](reproduction/{figure})", ""]
    return "\n".join(out)


def _rate_effects(behaviour: run.Behaviour, size: run.Size) -> tuple[Effects, Estimate | None]:
    """Change of the fraction of replies that show the behaviour, and that of the system message."""
    shows: dict[tuple[str, float], dict[str, list[float]]] = {}
    for cell, verdict in run.texts(behaviour, size):
        name = str(cell.arm.latent) if cell.arm.latent is not None else cell.arm.name.replace(" ", "_")
        shows.setdefault((name, cell.strength), {}).setdefault(cell.prompt.key, []).append(verdict == "shows")
    base = {p: float(np.mean(v)) for p, v in shows.get(("unsteered", 0.0), {}).items()}
    of: dict[str, dict[str, dict[str, float]]] = {}
    for (name, strength), by_prompt in shows.items():
        change = {p: float(np.mean(v)) - base[p] for p, v in by_prompt.items() if p in base}
        of.setdefault(name, {})[f"{strength:+g}"] = change
    system = of.get("system_message", {}).get("+0")
    return Effects("points of the rate", of), Estimate.of(list(system.values())) if system else None


def _verdict(name: str, what: str, span: Mapping[str, Array]) -> str:
    """How far each method moves it, from away to towards, and two of them against Δ-activation, prompt by prompt."""
    scale, unit = (100, "points") if what == "rate" else (1, "nats per token")
    order = sorted(span, key=lambda m: -float(span[m].mean()))
    means = ", ".join(f"{m} {scale * float(span[m].mean()):.{digits(scale)}f}" for m in order)
    against = "; ".join(
        f"{m} {said(Estimate.of(gap_P), scale)}, p = {sign_flip_p(gap_P):.2g}"
        for m in ("Δ-attribution", "steering gradient")
        for gap_P in [span[m] - span["Δ-activation"]]
    )
    return f"**{name}, {what}**: {means} {unit} from away to towards. Beyond Δ-activation: {against}."


def _together(what: str, n: int, of: Mapping[str, Sequence[Array]]) -> str:
    """The same over the prompts of all behaviours, where each was measured."""
    span = {method: np.concatenate(each) for method, each in of.items() if len(each) == n}
    return _verdict(f"all {n} behaviours, {len(span['Δ-activation'])} prompts", what, span)


def _figure(leaders: dict[str, Any], values: dict[tuple[str, bool], Any], unit: str, scale: float, path: Path) -> None:
    """Each latent's effect and the mean of the first ones, by rank (the post's first figure); each method's mean (its second)."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    ranks, means = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    for method, color in ((m, COLORS[m]) for m in leaders if m in COLORS):
        for towards in (False, True):
            v = scale * values[method, towards].mean(1)
            k = np.arange(1, len(v) + 1)
            ranks.plot(k, v, "o" if towards else "v", color=color, markersize=2.5, alpha=0.2, markeredgewidth=0)
            ranks.plot(k, v.cumsum() / k, color=color, linewidth=1.4, label=method if towards else None)
    for x, method in enumerate(leaders):
        color = COLORS.get(method, "#16202c")
        for towards in (False, True):
            e = Estimate.of(values[method, towards].mean(0))
            means.plot([x, x], [scale * e.low, scale * e.high], color=color, linewidth=1.6)
            means.plot([x], [scale * e.mean], "o" if towards else "v", color=color, markersize=5)
    means.set_xticks(range(len(leaders)), list(leaders), rotation=35, ha="right", fontsize=7)
    ranks.set_xlabel("rank; the lines are means of all up to it", fontsize=8)
    ranks.set_ylabel(f"change, {unit}", fontsize=8)
    ranks.legend(fontsize=7, frameon=False)
    for axes in (ranks, means):
        axes.axhline(0, color="#6b7280", linewidth=0.8, linestyle=":")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _shared(behaviours: Sequence[run.Behaviour], size: run.Size) -> str:
    lines = ["## One latent, several behaviours", ""]
    for method in run.METHODS[:-1]:
        of = {b.name: {latent for latent, _ in run.leaders(b, size)[method]} for b in behaviours}
        shared = [f"{a} and {b}: {len(of[a] & of[b])}" for a, b in combinations(of, 2)]
        if shared:
            lines.append(f"- Leaders by {method} (of {size.latents}) that two behaviours share: {', '.join(shared)}.")
    return "\n".join(lines) + "\n"
