"""An experiment in a terminal: tables and sequences as rich renderables. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trimtab.client.experiments import Effect, Experiment, ExperimentHealth, ExperimentResults, GuardrailResult, Look

__all__ = ["bar", "health_view", "history_view", "list_view", "results_view", "watch_view"]

_WIDTH = 29
_NARROW = 110
"""Columns of a terminal below which the sequences are numbers alone."""
_WHOLE = ("units", "difference", "sequence around 0", "worse by", "when")
"""Columns that are not broken over lines."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = {
    "better": "green",
    "safe": "green",
    "running": "green",
    "worse": "red",
    "breached": "red",
    "invalid": "red",
    "stopped": "red",
    "paused": "yellow",
}


def list_view(experiments: Iterable[Experiment]) -> RenderableType:
    """One line each."""
    table = _table("key", "state", "coverage", "arms", "hypothesis")
    for one in experiments:
        arms = ", ".join(arm["key"] for arm in one.definition["arms"])
        table.add_row(one.key, _said(one.state), f"{one.coverage:.0%}", arms, str(one.definition["hypothesis"]))
    return table


def history_view(one: Experiment) -> RenderableType:
    """How it stands, and every change of it."""
    table = _table("revision", "when", "who", "what", "coverage", "why")
    for change in one.history:
        when = f"{change.at:%Y-%m-%d %H:%M:%S}"
        table.add_row(
            str(change.revision), when, change.actor, change.action, f"{change.coverage:.0%}", Text(change.reason)
        )
    return Group(_head(one.key, one.state, one.coverage, one.revision), Text(str(one.definition["hypothesis"])), table)


def health_view(health: ExperimentHealth) -> RenderableType:
    """Whether what is measured can be trusted."""
    table = _table("arm", "units", "triggered", "requests", "how they ended")
    for arm in health.arms:
        ended = ", ".join(f"{n:,} {status}" for status, n in arm.statuses.items())
        table.add_row(arm.key, f"{arm.units:,}", f"{arm.triggered_units:,}", f"{arm.requests:,}", ended)
    lines: list[RenderableType] = [_head(health.key, health.state, health.coverage, health.revision)]
    lines.append(Text("healthy", "green") if health.healthy else Text("not healthy", "bold red"))
    lines += [Text(f"  {problem}", "red") for problem in health.problems]
    lines.append(table)
    lines.append(
        Text(
            f"exposures: {health.written:,} written, {health.dropped:,} lost, {health.waiting:,} waiting · sample ratio "
            f"p = {health.sample_ratio_p:.3g} · units in two arms: {health.crossovers:,}"
        )
    )
    if health.decisions:
        why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(health.decisions.items()))
        lines.append(Text(f"not enrolled: {why}"))
    if (step := health.next_step) is not None:
        waits = ", ".join(step.waits_for) or "nothing"
        lines.append(
            Text(f"next step: coverage {step.coverage:.0%}, not before {step.at:%Y-%m-%d %H:%M}, waits for {waits}")
        )
    return Group(*lines)


def results_view(results: ExperimentResults, *, every_population: bool = False) -> RenderableType:
    """What can be said now."""
    shown = [e for e in results.effects if every_population or e.population == "intent_to_treat"]
    lines: list[RenderableType] = [_head(results.key, results.state, results.coverage, results.revision)]
    lines += [Text(f"  {note}", "yellow") for note in results.notes]
    lines.append(_Effects(shown, results))
    if results.guardrails:
        lines.append(_guardrails_table(results.guardrails))
    lines.append(Text(_outlook(results), "dim"))
    return Group(*lines)


def watch_view(
    results: ExperimentResults, health: ExperimentHealth, looks: Sequence[Look], *, at: str
) -> RenderableType:
    """All at once, for a terminal that shows it live."""
    parts: list[RenderableType] = [results_view(results)]
    for arm in results.verdicts:
        widths = [
            one.high - one.low if one.low is not None and one.high is not None else None
            for look in looks
            for one in look.effects
            if one.arm == arm
        ]
        if any(width is not None for width in widths):
            parts.append(Text(f"width of {arm}'s sequence so far  {_spark(widths)}  {_last(widths)}"))
    wrong = Text("\n".join(health.problems), "red") if health.problems else Text("healthy", "green")
    parts.append(Panel(wrong, title=f"{health.written:,} exposures, {health.dropped:,} lost", title_align="left"))
    parts.append(Text(f"{at} · ^C ends watching, and nothing else", "dim"))
    return Group(*parts)


def bar(low: float | None, high: float | None, estimate: float | None, reach: float, width: int = _WIDTH) -> str:
    """A sequence on a line from −reach to reach, 0 in its middle: `·····├──●──┤··│·········`."""
    line = ["·"] * width
    line[width // 2] = "│"

    def place(value: float) -> int:
        return max(0, min(width - 1, round((value / reach + 1) / 2 * (width - 1)))) if reach else width // 2

    if low is not None and high is not None:
        for i in range(place(low), place(high) + 1):
            line[i] = "─"
        if low >= -reach:
            line[place(low)] = "├"
        if high <= reach:
            line[place(high)] = "┤"
    if estimate is not None:
        line[place(estimate)] = "●"
    return "".join(line)


class _Effects:
    """The table of effects, without its drawings where the terminal has no place for them."""

    def __init__(self, effects: Sequence[Effect], results: ExperimentResults) -> None:
        self._effects = effects
        self._results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _effects_table(self._effects, self._results, draws=options.max_width >= _NARROW)


def _effects_table(effects: Sequence[Effect], results: ExperimentResults, *, draws: bool) -> Table:
    drawing = ("sequence around 0",) if draws else ()
    table = _table("metric", "arm", "units", "control", "treated", "difference", *drawing, "p", "")
    for one in effects:
        is_primary = one.metric == results.primary
        ends = (
            abs(end)
            for e in effects
            if e.metric == one.metric
            for end in (e.low, e.high, e.estimate)
            if end is not None
        )
        drawn = (bar(one.low, one.high, one.estimate, 1.1 * max(ends, default=0.0)),) if draws else ()
        verdict = _said(results.verdicts[one.arm]) if is_primary and one.population == "intent_to_treat" else Text("")
        if one.population != "intent_to_treat":
            verdict = Text(one.population.replace("_", " "), "dim")
        table.add_row(
            Text(one.metric, "bold" if is_primary else ""), one.arm, f"{one.n_control:,} · {one.n_treated:,}",
            _number(one.control), _number(one.treated), _interval(one.estimate, one.low, one.high),
            *drawn, f"{one.p:.2g}", verdict,
        )  # fmt: skip
    return table


def _guardrails_table(rails: Sequence[GuardrailResult]) -> Table:
    table = _table("guardrail", "arm", "worse by", "tolerated", "")
    for rail in rails:
        table.add_row(
            rail.metric, rail.arm, _interval(rail.harm, rail.low, rail.high), f"{rail.margin:g}", _said(rail.state)
        )
    return table


def _outlook(results: ExperimentResults) -> str:
    said = [f"sample ratio p = {results.sample_ratio_p:.3g}", f"minimum effect {results.minimum_effect:g}"]
    if results.units_needed is not None:
        said.append(f"{results.units_needed:,} units in two arms find it with a probability of 80 %")
    if results.days_left is not None:
        said.append(f"{results.days_left:.1f} days left")
    if results.over is not None:
        said.append(f"the stop rule is met: {results.over}")
    return " · ".join(said)


def _head(key: str, state: str, coverage: float, revision: int) -> Text:
    return Text.assemble((key, "bold"), "  ", _said(state), f"  coverage {coverage:.0%}  revision {revision}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, no_wrap=name in _WHOLE, overflow="fold")
    return table


def _said(word: str) -> Text:
    return Text(word.replace("_", " "), _COLOURS.get(word, "dim"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(estimate: float | None, low: float | None, high: float | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate:+.3g}" + ("" if low is None or high is None else f" [{low:+.3g}, {high:+.3g}]")


def _spark(widths: Sequence[float | None]) -> str:
    largest = max(width for width in widths if width is not None)
    return "".join(
        " " if width is None else _BLOCKS[min(len(_BLOCKS) - 1, int(width / largest * (len(_BLOCKS) - 1)))]
        for width in widths
    )


def _last(widths: Sequence[float | None]) -> str:
    return next((f"±{width / 2:.3g}" for width in reversed(widths) if width is not None), "")
