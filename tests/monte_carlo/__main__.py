"""How often the analysis of experiments errs (`make monte-carlo`): writes docs/experiments-analysis.md; ten minutes of one core.

`--runs N` is quicker or surer than the 1,000 runs of the documentation; `--no-write` only prints.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.monte_carlo import sample_ratio, whole
from tests.monte_carlo.page import Figures, section, wrong
from tests.monte_carlo.watched import KINDS, promised_power, watch

PAGE = Path("docs/experiments-analysis.md")
BEGIN, END = "<!-- make monte-carlo -->", "<!-- end -->"


def figures(n_runs: int, console: Console) -> Figures:
    """All of them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("one metric at a time", total=2 * len(KINDS))
        alike, apart = {}, {}
        for kind, about in KINDS.items():
            alike[kind] = watch(kind, n_runs=n_runs)
            progress.advance(bar)
            apart[kind] = watch(kind, effect=about.effect, n_runs=n_runs, seed=1)
            progress.advance(bar)
        bar = progress.add_task("whole experiments", total=n_runs)
        errors = dict.fromkeys(whole.ERRORS, 0)
        for so_far in whole.errors(n_runs):
            errors |= so_far
            progress.advance(bar)
        bar = progress.add_task("sample ratio, power", total=3)
        honest = sample_ratio.alarms(0.5, n_runs=n_runs)
        progress.advance(bar)
        skewed = sample_ratio.alarms(0.53, n_runs=n_runs)
        progress.advance(bar)
        power = promised_power(n_runs=n_runs)
        progress.advance(bar)
    return Figures(n_runs, alike, apart, errors, honest, skewed, power)


def main() -> int:
    """0 if every rate of error is within its bound, the error of the Monte Carlo allowed for."""
    parser = argparse.ArgumentParser(prog="python -m tests.monte_carlo", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--no-write", dest="write", action="store_false")
    given = parser.parse_args()
    console = Console(stderr=True)
    found = figures(given.runs, console)
    text = section(found)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if given.write:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}")
    failed = wrong(found)
    for line in failed:
        console.print(f"[bold red]{line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
