"""The results of an experiment at this moment, valid however often they are looked at: pure arithmetic over one row per unit.

Each metric, in each treated arm against the control:

    intent_to_treat   every assigned unit that was exposed, what it really got notwithstanding
    triggered         the units whose gate fired, or would have fired: it is evaluated in both arms, so the comparison is fair
    per_protocol      without the units that got something else than their arm (failed open)

The primary metric's α is divided by the number of treated arms (Bonferroni); secondary metrics share one α by Holm's procedure
over their always-valid p-values, which holds for any dependence. Guardrails are one-sided at α each, uncorrected: a missed harm
is worse than a false alarm. A guardrail is `safe` once the whole sequence of the harm lies below the margin, `breached`
once above.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.server.experiments.definition import Experiment, Guardrail, Metric
from trimtab.server.experiments.sequences import (
    Moments,
    bound,
    difference,
    half_width,
    p_value,
    rho_for,
    sample_ratio_p,
    units_needed,
)
from trimtab.server.experiments.values import adjusted, moments, ratio_values

__all__ = [
    "MIN_UNITS",
    "SAMPLE_RATIO_ALPHA",
    "Effect",
    "GuardrailResult",
    "Population",
    "Results",
    "Units",
    "Verdict",
    "analyse",
    "effect",
    "holm",
]

MIN_UNITS = 50
"""Units an arm needs before a sequence is shown: the guarantee is asymptotic, and the Monte Carlo starts here."""
PLANNED_UNITS = 5000.0
"""The N at which sequences are tightest, where the stop rule names none."""
SAMPLE_RATIO_ALPHA = 0.01

Population = Literal["intent_to_treat", "triggered", "per_protocol"]
POPULATIONS: tuple[Population, ...] = ("intent_to_treat", "triggered", "per_protocol")
Verdict = Literal["collecting", "better", "worse", "no_effect", "invalid"]


@dataclass(frozen=True)
class Units:
    """One row per exposed unit; forced arms and units seen in two arms are not among them."""

    arm_U: npt.NDArray[np.int64]
    """Index of the arm."""
    triggered_U: npt.NDArray[np.bool_]
    """Whether its generation was, or would have been, altered."""
    complied_U: npt.NDArray[np.bool_]
    """Whether it always got what its arm gives."""
    outcomes: Mapping[str, npt.NDArray[np.float64]]
    """Per outcome, the unit's sum; 0 without any."""

    def of(self, chosen_U: npt.NDArray[np.bool_]) -> "Units":
        """The chosen rows."""
        outcomes = {key: values[chosen_U] for key, values in self.outcomes.items()}
        return Units(self.arm_U[chosen_U], self.triggered_U[chosen_U], self.complied_U[chosen_U], outcomes)

    def outcome(self, key: str) -> npt.NDArray[np.float64]:
        """The sums of one outcome, 0 where nobody has reported any."""
        return self.outcomes.get(key, np.zeros(len(self.arm_U)))


class Effect(NamedTuple):
    """A treated arm against the control, on one metric."""

    metric: str
    arm: str
    population: Population
    n_control: int
    n_treated: int
    control: float
    """The control's mean, proportion or ratio."""
    treated: float
    estimate: float
    """Treated − control."""
    low: float
    high: float
    """The confidence sequence; unbounded while there are too few units to say."""
    p: float
    """Always valid; for secondary metrics corrected."""


class GuardrailResult(NamedTuple):
    """How much worse than the control a treated arm is on a guardrail, at least and at most."""

    metric: str
    arm: str
    margin: float
    harm: float
    low: float
    high: float
    """Each a one-sided sequence at α."""
    state: Literal["collecting", "safe", "breached"]


@dataclass(frozen=True)
class Results:
    """All that can be said now."""

    experiment: str
    n_units: tuple[int, ...]
    """Per arm."""
    sample_ratio_p: float
    effects: tuple[Effect, ...]
    guardrails: tuple[GuardrailResult, ...]
    verdicts: Mapping[str, Verdict]
    """Per treated arm, on the primary metric by intent to treat."""
    units_needed: int | None
    """In control and one arm together, for the minimum effect at a power of 0.8."""
    days_left: float | None
    notes: tuple[str, ...]


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
    primary_alpha = experiment.alpha / len(treated)
    effects: list[Effect] = []
    for population in POPULATIONS:
        rows = _population(units, population)
        for arm in treated:
            effects.append(effect(experiment, rows, experiment.primary, arm, population, primary_alpha))
        family = [
            effect(
                experiment, rows, metric, arm, population, experiment.alpha / (len(experiment.secondary) * len(treated))
            )
            for metric in experiment.secondary
            for arm in treated
        ]
        corrected = holm([one.p for one in family])
        effects += [one._replace(p=p) for one, p in zip(family, corrected, strict=True)]
    guardrails = tuple(_guardrail(experiment, units, rail, arm) for rail in experiment.guardrails for arm in treated)

    needed = _needed(experiment, units)
    n_units = tuple(int((units.arm_U == arm).sum()) for arm in range(len(experiment.arms)))
    notes = (
        []
        if mismatch > SAMPLE_RATIO_ALPHA
        else [f"sample ratio mismatch, p = {mismatch:.2g}: nothing below can be trusted"]
    )
    verdicts = {
        one.arm: "invalid" if mismatch <= SAMPLE_RATIO_ALPHA else _verdict(experiment, one)
        for one in effects[: len(treated)]
    }
    left = None
    if needed is not None and days:
        pace = min(n_units[0] + n_units[arm] for arm in treated) / days
        left = max(0.0, needed / pace - days) if pace else None
        if left is not None and experiment.stop.max_days is not None:
            left = min(left, max(0.0, experiment.stop.max_days - days))
    return Results(experiment.key, n_units, mismatch, tuple(effects), guardrails, verdicts, needed, left, tuple(notes))


def effect(
    experiment: Experiment, units: Units, metric: Metric, arm: int, population: Population, alpha: float
) -> Effect:
    """One arm against the control on one metric; unbounded until both arms have `MIN_UNITS` and a spread."""
    control, treated = _moments(units, metric, 0), _moments(units, metric, arm)
    key = experiment.arms[arm].key
    estimate, error = difference(control, treated) if control.n and treated.n else (np.nan, np.nan)
    low, high, p = -np.inf, np.inf, 1.0
    if _enough(control, treated):
        rho = _rho(experiment, alpha)
        n = control.n + treated.n
        width = half_width(error, n, alpha, rho)
        low, high, p = float(estimate - width), float(estimate + width), float(p_value(estimate, error, n, rho))
    return Effect(
        metric.key, key, population, int(control.n), int(treated.n), float(control.mean), float(treated.mean),
        float(estimate), low, high, p,
    )  # fmt: skip


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given: reject where the adjusted p is at most α."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted_p, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted_p[i] = largest
    return adjusted_p


def _population(units: Units, population: Population) -> Units:
    match population:
        case "intent_to_treat":
            return units
        case "triggered":
            return units.of(units.triggered_U)
        case "per_protocol":
            return units.of(units.complied_U)


def _moments(units: Units, metric: Metric, arm: int) -> Moments:
    of = units.arm_U == arm
    y_U = units.outcome(metric.outcome)
    if metric.kind == "ratio":
        return moments(ratio_values(y_U[of], units.outcome(str(metric.denominator))[of]))
    if metric.kind == "proportion":
        y_U = (y_U > 0).astype(np.float64)
    if metric.covariate is not None and len(y_U):
        y_U = adjusted(y_U, units.outcome(metric.covariate))
    return moments(y_U[of])


def _enough(control: Moments, treated: Moments) -> bool:
    """Whether a sequence can be shown: without spread in one arm (a rare outcome that has not happened yet) it would be a lie."""
    return bool(min(control.n, treated.n) >= MIN_UNITS and min(control.variance, treated.variance) > 0)


def _rho(experiment: Experiment, alpha: float) -> float:
    return rho_for(float(experiment.stop.max_units or PLANNED_UNITS), alpha)


def _guardrail(experiment: Experiment, units: Units, rail: Guardrail, arm: int) -> GuardrailResult:
    control, treated = _moments(units, rail.metric, 0), _moments(units, rail.metric, arm)
    key = experiment.arms[arm].key
    if not _enough(control, treated):
        return GuardrailResult(rail.metric.key, key, rail.margin, np.nan, -np.inf, np.inf, "collecting")
    estimate, error = difference(control, treated)
    harm = float(estimate) if rail.metric.direction == "decrease" else -float(estimate)
    width = float(bound(error, control.n + treated.n, experiment.alpha, _rho(experiment, experiment.alpha)))
    state: Literal["collecting", "safe", "breached"] = "collecting"
    if harm + width < rail.margin:
        state = "safe"
    elif harm - width > rail.margin:
        state = "breached"
    return GuardrailResult(rail.metric.key, key, rail.margin, harm, harm - width, harm + width, state)


def _verdict(experiment: Experiment, one: Effect) -> Verdict:
    if one.n_control + one.n_treated < experiment.stop.min_units:
        return "collecting"
    if one.low > 0 or one.high < 0:
        return "better" if (one.low > 0) == (experiment.primary.direction == "increase") else "worse"
    if max(-one.low, one.high) < experiment.minimum_effect:
        return "no_effect"
    return "collecting"


def _needed(experiment: Experiment, units: Units) -> int | None:
    """For the arm with the most spread."""
    alpha = experiment.alpha / (len(experiment.arms) - 1)
    needed = []
    control = _moments(units, experiment.primary, 0)
    for arm in range(1, len(experiment.arms)):
        treated = _moments(units, experiment.primary, arm)
        if not _enough(control, treated):
            return None
        _, error = difference(control, treated)
        variance = float(error**2 * (control.n + treated.n))
        needed.append(units_needed(variance, experiment.minimum_effect, alpha, _rho(experiment, alpha)))
    return max(needed)
