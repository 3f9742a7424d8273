"""The results of an experiment at this moment, valid however often they are looked at: pure arithmetic over one row per unit.

Each metric, in each treated arm against the control:

    intent_to_treat   every assigned unit that was exposed, what it really got notwithstanding
    triggered         the units whose gate fired, or would have fired: it is evaluated in both arms, so the comparison is fair
    per_protocol      without the units that got something else than their arm (failed open)

"Has a gate fired so far" is fair although steering changes what comes later: up to the first firing the arms do the same. Whether
they did is tested like the sample ratio, and a mismatch is noted. `per_protocol` is no randomised comparison and decides nothing.

The primary metric's α is divided by the number of treated arms (Bonferroni); secondary metrics share one α by Holm's procedure
(1979) over their always-valid p-values, which holds for any dependence and, as each p-value holds at all looks at once, at all
looks. Guardrails are one-sided at α each, uncorrected: a missed harm is worse than a false alarm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.server.experiments.definition import Experiment, Metric
from trimtab.server.experiments.effect import (
    Effect,
    GuardrailResult,
    effect,
    enough,
    guardrail,
    pair,
    planned_units,
    sequence,
)
from trimtab.server.experiments.sample import POPULATIONS, Population, Units
from trimtab.server.experiments.sequences import difference, power, rho_for, sample_ratio_p, units_needed
from trimtab.server.experiments.values import floored, moments

__all__ = ["SAMPLE_RATIO_ALPHA", "Results", "Verdict", "analyse", "holm", "primary_alpha"]

SAMPLE_RATIO_ALPHA = 0.01
TARGET_POWER = 0.8

Verdict = Literal["collecting", "better", "worse", "no_effect", "invalid"]


@dataclass(frozen=True)
class Results:
    """All that can be said now."""

    experiment: str
    n_units: tuple[int, ...]
    """Per arm."""
    sample_ratio_p: float
    triggered_ratio_p: Mapping[str, float]
    """Per treated arm, the same of the triggered units."""
    effects: tuple[Effect, ...]
    """The primary metric's by intent to treat first."""
    guardrails: tuple[GuardrailResult, ...]
    verdicts: Mapping[str, Verdict]
    """Per treated arm, on the primary metric by intent to treat."""
    units_needed: int | None
    """In control and one arm together, for the minimum effect at a power of 0.8."""
    power: float | None
    """The probability to have found the minimum effect by the planned number of units, at the spread seen so far."""
    days_left: float | None
    """Until `units_needed` or the end of the stop rule at the present pace, whichever comes first."""
    over: Literal["conclusive", "max_units", "max_days"] | None
    """What of the stop rule is met; None while nothing is."""
    notes: tuple[str, ...]
    """What to know before believing the rest."""


def analyse(
    experiment: Experiment,
    units: Units,
    *,
    counts_EK: npt.ArrayLike,
    shares_EK: npt.ArrayLike,
    days: float | None = None,
) -> Results:
    """The results over `units`; counts and shares per stretch of equal coverage and per arm, for the sample ratio test."""
    treated = range(1, len(experiment.arms))
    mismatch = float(sample_ratio_p(counts_EK, shares_EK))
    compared = {(population, arm): units.compared(arm, population) for population in POPULATIONS for arm in treated}
    triggered = {
        experiment.arms[arm].key: _triggered_p(compared["triggered", arm], counts_EK, shares_EK, arm) for arm in treated
    }
    everybody = {arm: compared["intent_to_treat", arm] for arm in treated}
    effects = tuple(one for population in POPULATIONS for one in _effects(experiment, compared, population))
    invalid = mismatch <= SAMPLE_RATIO_ALPHA
    notes = [f"sample ratio mismatch, p = {mismatch:.2g}: nothing below can be trusted"] if invalid else []
    notes += [
        f"triggered units of {key!r} and of the control are not in proportion, p = {p:.2g}: read intent to treat alone"
        for key, p in triggered.items()
        if p <= SAMPLE_RATIO_ALPHA
    ]
    notes += _uneven(experiment, everybody)
    needed, found = _planning(experiment, everybody)
    n_units = units.counts(len(experiment.arms))
    verdicts: dict[str, Verdict] = {
        one.arm: "invalid" if invalid else _verdict(experiment, one, sum(n_units)) for one in effects[: len(treated)]
    }
    return Results(
        experiment.key,
        n_units,
        mismatch,
        triggered,
        effects,
        tuple(guardrail(experiment, everybody[arm], rail, arm) for rail in experiment.guardrails for arm in treated),
        verdicts,
        needed,
        found,
        _days_left(experiment, n_units, needed, days),
        _over(experiment, verdicts, sum(n_units), days),
        tuple(notes),
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given: reject where the adjusted p is at most α."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted_p, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted_p[i] = largest
    return adjusted_p


def primary_alpha(experiment: Experiment) -> float:
    """The α of one treated arm on the primary metric."""
    return experiment.alpha / (len(experiment.arms) - 1)


def _effects(
    experiment: Experiment, compared: Mapping[tuple[Population, int], Units], population: Population
) -> list[Effect]:
    """Of one population: the primary metric's, then the secondary ones' with their p-values corrected."""
    alpha, n_secondary = primary_alpha(experiment), len(experiment.secondary)

    def of(metric: Metric, alpha: float) -> list[Effect]:
        return [
            effect(experiment, compared[population, arm], metric, arm, population, alpha)
            for arm in range(1, len(experiment.arms))
        ]

    family = [one for metric in experiment.secondary for one in of(metric, alpha / n_secondary)]
    corrected = holm([one.p for one in family])
    return [
        *of(experiment.primary, alpha),
        *(one._replace(p=p) for one, p in zip(family, corrected, strict=True)),
    ]


def _triggered_p(triggered: Units, counts_EK: npt.ArrayLike, shares_EK: npt.ArrayLike, arm: int) -> float:
    """Of the control's and one arm's triggered units against the shares of all stretches together."""
    counts, shares = np.asarray(counts_EK, float), np.asarray(shares_EK, float)
    if not counts.sum():
        return 1.0
    expected = (counts.sum(-1) @ shares)[[0, arm]]
    n = triggered.counts(arm + 1)
    return float(sample_ratio_p([[n[0], n[arm]]], [expected / expected.sum()]))


def _uneven(experiment: Experiment, everybody: Mapping[int, Units]) -> list[str]:
    """Outcomes that are reported of more units in one arm than in the control: what is missing counts as 0."""
    notes = []
    keys = {m.outcome for m in experiment.metrics} | {m.denominator for m in experiment.metrics if m.denominator}
    for outcome in sorted(keys):
        for arm, units in everybody.items():
            seen_U = units.reported(outcome).astype(np.float64)
            control, treated = floored(moments(seen_U[units.arm_U == 0]), moments(seen_U[units.arm_U == arm]))
            found = sequence(control, treated, planned_units(experiment), SAMPLE_RATIO_ALPHA)
            if found.p <= SAMPLE_RATIO_ALPHA:
                notes.append(
                    f"{outcome!r} is reported of {control.mean:.0%} of the control's units and of {treated.mean:.0%} of "
                    f"{experiment.arms[arm].key!r}'s; what is not reported counts as 0"
                )
    return notes


def _verdict(experiment: Experiment, one: Effect, n_units: int) -> Verdict:
    if n_units < experiment.stop.min_units:
        return "collecting"
    if one.low > 0 or one.high < 0:
        return "better" if (one.low > 0) == (experiment.primary.direction == "increase") else "worse"
    if max(-one.low, one.high) < experiment.minimum_effect:
        return "no_effect"
    return "collecting"


def _planning(experiment: Experiment, everybody: Mapping[int, Units]) -> tuple[int | None, float | None]:
    """Units needed and power, of the arm with the most spread."""
    alpha, planned = primary_alpha(experiment), planned_units(experiment)
    rho = rho_for(planned, alpha)
    spread = 0.0
    for arm, units in everybody.items():
        control, treated = pair(units, experiment.primary, arm)
        if not enough(control, treated):
            return None, None
        _, error = difference(control, treated)
        spread = max(spread, float(error**2 * (control.n + treated.n)))
    needed = units_needed(spread, experiment.minimum_effect, alpha, rho, TARGET_POWER)
    return needed, float(power(spread, experiment.minimum_effect, planned, alpha, rho))


def _days_left(
    experiment: Experiment, n_units: tuple[int, ...], needed: int | None, days: float | None
) -> float | None:
    stop = experiment.stop
    if not days:
        return None
    paces = [min(n_units[0] + n for n in n_units[1:]) / days, sum(n_units) / days]
    wanted = [needed if stop.when == "conclusive" else None, stop.max_units]
    ends = [n / pace - days for n, pace in zip(wanted, paces, strict=True) if n is not None and pace]
    if stop.max_days is not None:
        ends.append(stop.max_days - days)
    return max(0.0, min(ends)) if ends else None


def _over(
    experiment: Experiment, verdicts: Mapping[str, Verdict], n_units: int, days: float | None
) -> Literal["conclusive", "max_units", "max_days"] | None:
    stop = experiment.stop
    if stop.when == "conclusive" and not {"collecting", "invalid"} & set(verdicts.values()):
        return "conclusive"
    if stop.max_units is not None and n_units >= stop.max_units:
        return "max_units"
    return "max_days" if stop.max_days is not None and (days or 0.0) >= stop.max_days else None
