"""The figures as a section of the documentation, and which of them break a promise."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tests.monte_carlo.sample_ratio import Alarms
from tests.monte_carlo.watched import KINDS, LOOKS, PER_LOOK, Watched
from tests.monte_carlo.whole import ERRORS
from trimtab.server.experiments.analysis import SAMPLE_RATIO_ALPHA

__all__ = ["Figures", "section", "within", "wrong"]

ALPHA = 0.05
BOUNDS = dict.fromkeys(ERRORS, ALPHA) | {
    "sample_ratio": SAMPLE_RATIO_ALPHA,
    "triggered_ratio": 2 * SAMPLE_RATIO_ALPHA,
    "uneven": 10 * SAMPLE_RATIO_ALPHA,
}
"""What each error of a whole experiment may come to: tests of two arms, and of five outcomes in two arms, are not corrected."""


class Figures(NamedTuple):
    """All that was simulated."""

    n_runs: int
    alike: Mapping[str, Watched]
    apart: Mapping[str, Watched]
    errors: Mapping[str, int]
    """Runs of whole experiments that ever erred."""
    honest: Alarms
    skewed: Alarms
    power: tuple[int, float, float]


def within(share: float, bound: float, n_runs: int) -> bool:
    """Whether a share of runs is at most the bound, three standard errors of the Monte Carlo allowed for."""
    return bool(share <= bound + 3 * (bound * (1 - bound) / n_runs) ** 0.5)


def wrong(found: Figures) -> list[str]:
    """The promises that are broken, in sentences."""
    rates = [(f"{kind}: two-sided", one.two_sided, ALPHA) for kind, one in found.alike.items()]
    rates += [(f"{kind}: one-sided", one.one_sided, ALPHA) for kind, one in found.alike.items()]
    rates += [(f"{kind}: true effect missed", one.missed, ALPHA) for kind, one in found.apart.items()]
    rates += [(says, found.errors[kind] / found.n_runs, BOUNDS[kind]) for kind, says in ERRORS.items()]
    rates.append(("sample ratio, honest", found.honest.share, SAMPLE_RATIO_ALPHA))
    failed = [
        f"{what}: {share:.1%}, above {bound:.0%}"
        for what, share, bound in rates
        if not within(share, bound, found.n_runs)
    ]
    if found.skewed.share < 1:
        failed.append(f"53/47 is caught in {found.skewed.share:.1%} of the runs only")
    return failed


def section(found: Figures) -> str:
    """Markdown."""
    needed, at_end, by_then = found.power
    return f"""
{found.n_runs:,} runs of each, {LOOKS} looks at each run, α = {100 * ALPHA:.0f} %. Chance alone moves a rate of 5 % by {
        _error(found.n_runs)
    } points
(one standard error).

**One metric, two arms**, {
        PER_LOOK
    } new units per arm between two looks. The z-test is a fixed-horizon test watched as often.

{
        _table(
            (
                "metric",
                "A/A: ever decided",
                "one-sided",
                "z-test",
                "effect",
                "ever found",
                "true effect always covered",
            ),
            (
                (
                    about.says,
                    _pct(found.alike[kind].two_sided),
                    _pct(found.alike[kind].one_sided),
                    _pct(found.alike[kind].z_test),
                    f"{about.effect:g}",
                    _pct(found.apart[kind].two_sided),
                    _pct(1 - found.apart[kind].missed),
                )
                for kind, about in KINDS.items()
            ),
        )
    }
**Whole experiments** through `analyse`: an A/A of three arms (0.4, 0.4, 0.2), a proportion with a covariate, three secondary
metrics (lognormal, count, ratio), one guardrail, half of the units triggered, a tenth without outcomes. Every line is an error.

{
        _table(
            ("ever", "runs", "at most"),
            ((says, _pct(found.errors[k] / found.n_runs), _pct(BOUNDS[k])) for k, says in ERRORS.items()),
        )
    }
**Sample ratio**, two arms meant to get half each, coverage ramped twice, 500 new units between two looks, α = {
        SAMPLE_RATIO_ALPHA:.0%}: an
honest split alarms in {_pct(found.honest.share)} of the runs; 53/47 is caught in {
        _pct(found.skewed.share)
    }, at a median of \
{found.skewed.units:,.0f} units.

**Power**: 30 % against 35 % needs {
        needed:,} units in two arms for a power of 80 %. Looked at there alone it is found in {_pct(at_end)} of the
runs; watched until then, in {_pct(by_then)}.
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    listed = [list(head), *(list(row) for row in rows)]
    rule = ["---", *["---:"] * (len(listed[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (listed[0], rule, *listed[1:]))


def _pct(share: float) -> str:
    return f"{100 * share:.1f} %"


def _error(n_runs: int) -> str:
    return f"{100 * (ALPHA * (1 - ALPHA) / n_runs) ** 0.5:.1f}"
