"""The tables of a benchmark's results, for a terminal; `markdown` for the documents."""

import statistics
from typing import Any

from rich.table import Table

from tests.bench.conditions import CONDITIONS, Cell

__all__ = ["flatness", "markdown", "ratios", "spread", "tables"]


def ratios(rounds: list[dict[str, Any]], condition: str, figure: str) -> list[float]:
    """Plain vLLM's figure over the condition's, by round, each the mean of its two processes where both ran; for either process
    of plain vLLM the other's; where there is none, that of the same edit with one plan."""
    found = []
    for took in rounds:
        if condition not in took:
            continue
        base = [took[name][figure] for name in ("plain", "plain again") if name in took]
        mine = [took[name][figure] for name in (condition, f"{condition} again") if name in took]
        if condition.startswith("plain"):
            other = "plain" if condition == "plain again" else "plain again"
            base, mine = [took[other][figure]] if other in took else [], [took[condition][figure]]
        elif not base:
            first = condition.split(",")[0] + ", 1 plans"
            if first not in took:
                continue
            base = [took[first][figure]]
        if base and all(mine):
            found.append(statistics.mean(base) / statistics.mean(mine))
    return found


def flatness(rounds: list[dict[str, Any]], edit: str, figure: str) -> list[float]:
    """What 64 plans take over what one takes, by round."""
    one, many = f"{edit}, 1 plans", f"{edit}, 64 plans"
    return [took[many][figure] / took[one][figure] for took in rounds if one in took and many in took]


def rows(results: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of each cell."""
    found = []
    for name, cell in results["cells"].items():
        rounds, settings = cell["rounds"], cell["settings"]
        title = (
            f"{name}: {settings['n']} at once, {settings['n_prompt']} prompt and {settings['n_tokens']} new tokens, "
            f"{Cell(**settings).n_rounds(len(rounds))} rounds{', in turns' if settings['groups'] else ''}"
        )
        lines = []
        for condition in CONDITIONS:
            took = [r[condition] for r in rounds if condition in r]
            if not took or (condition.endswith(" again") and condition != "plain again"):
                continue
            n_tokens = settings["n"] * (settings["n_tokens"] + (settings["n_prompt"] if "prefill" in name else 0))
            first = [t["first_token"] for t in took if t["first_token"]]
            lines.append(
                [
                    condition,
                    f"{n_tokens / statistics.median(t['seconds'] for t in took):.0f}",
                    spread(ratios(rounds, condition, "seconds")),
                    spread(ratios(rounds, condition, "worker_cpu")),
                    _per_step(cell, condition),
                    f"{1e3 * statistics.median(first):.0f}" if first else "–",
                    f"{100 * statistics.median(t['others_cpu'] / t['seconds'] for t in took):.1f}",
                ]
            )
        found.append((title, lines))
    return found


HEADERS = (
    "condition",
    "tokens/s",
    "wall ratio to plain",
    "worker CPU ratio",
    "CPU ms a step over plain",
    "first token, ms",
    "others' CPU, %",
)


def _per_step(cell: dict[str, Any], condition: str) -> str:
    """Worker CPU milliseconds a step beyond plain vLLM's."""
    rounds, n_steps = cell["rounds"], cell["settings"]["n_tokens"]
    found = []
    for took in rounds:
        base = [took[name]["worker_cpu"] for name in ("plain", "plain again") if name in took]
        if base and condition in took:
            found.append(1e3 * (took[condition]["worker_cpu"] - statistics.mean(base)) / n_steps)
    return f"{statistics.median(found):+.2f}" if found else "–"


def tables(results: dict[str, Any]) -> list[Table]:
    """One table a cell, and one of admission and upload."""
    found = []
    for title, lines in rows(results):
        table = Table(title=title)
        for header in HEADERS:
            table.add_column(header, justify="left" if header == "condition" else "right")
        for line in lines:
            table.add_row(*line)
        found.append(table)
    for name, pairs in _latencies(results):
        table = Table(title=name)
        table.add_column("")
        table.add_column("")
        for pair in pairs:
            table.add_row(*pair)
        found.append(table)
    return found


def markdown(results: dict[str, Any]) -> str:
    """The same for a document."""
    parts = []
    for title, lines in rows(results):
        parts.append(f"### {title}\n\n| {' | '.join(HEADERS)} |\n|---{'|---:' * (len(HEADERS) - 1)}|\n")
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n")
    for name, pairs in _latencies(results):
        parts.append(f"### {name}\n\n| | |\n|---|---:|\n" + "".join(f"| {a} | {b} |\n" for a, b in pairs) + "\n")
    return "".join(parts)


def _latencies(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    found = []
    if "admission" in results:
        lines = []
        for edit, parts in results["admission"].items():
            shares = ", ".join(f"{name} {parts[name]:.2f}" for name in ("service", "engine", "worker"))
            lines.append((edit, f"{parts['total']:.2f} ({shares})"))
        found.append(("admission of a new plan, CPU milliseconds, median of 200", lines))
    if called := results.get("calls"):
        plain = called["plain"]
        lines = [
            (
                edit,
                f"{counts['forward'] - plain['forward']:+.0f} in the forward, {counts['step'] - plain['step']:+.0f} in all",
            )
            for edit, counts in called.items()
            if edit != "plain"
        ]
        title = "calls of a decode step of 16 beyond plain vLLM's: {forward:.0f} in the forward, {step:.0f} in all"
        found.append((title.format(**plain), lines))
    if within := results.get("within"):
        lines = []
        for edit, turns in within.items():
            added = [[1e3 * (b - a) for a, b in zip(plain, steered, strict=True)] for plain, steered in turns]
            parts = zip(("before", "in", "after"), zip(*added, strict=True), strict=True)
            lines.append((edit, ", ".join(f"{statistics.median(values):+.3f} {where}" for where, values in parts)))
        whole = statistics.median(1e3 * sum(plain) for turns in within.values() for plain, _ in turns)
        what = "added to a step of 16 before, in and after the model"
        found.append((f"{what}, CPU milliseconds of {whole:.0f}, medians of the turns", lines))
    for n, by_edit in results.get("step", {}).items():
        lines = [(edit, f"{milliseconds:.3f}") for edit, milliseconds in by_edit.items()]
        found.append((f"added to a decode step of {n}, in the worker, CPU milliseconds, median of 200", lines))
    if "upload" in results:
        lines = [
            (f"server {name}", f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})")
            for name, values in results["upload"].items()
        ]
        found.append(("from an uploaded bundle to the first steered token, seconds", lines))
    return found


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    if not values:
        return "–"
    return f"{statistics.median(values):.3f} ({min(values):.3f} … {max(values):.3f})"
