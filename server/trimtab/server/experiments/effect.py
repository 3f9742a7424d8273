"""A treated arm against the control on one metric: how much it differs, and how much worse it is than a guardrail allows.

Too few units in an arm, or no spread in either, and the sequence is unbounded: the guarantee is asymptotic.
"""

from typing import Literal, NamedTuple

import numpy as np

from trimtab.server.experiments.definition import Experiment, Guardrail, Metric
from trimtab.server.experiments.sample import Population, Units
from trimtab.server.experiments.sequences import Moments, bound, difference, half_width, p_value, rho_for
from trimtab.server.experiments.values import floored

__all__ = [
    "MIN_UNITS",
    "PLANNED_UNITS",
    "Effect",
    "GuardrailResult",
    "Sequence",
    "effect",
    "enough",
    "guardrail",
    "pair",
    "planned_units",
    "sequence",
]

MIN_UNITS = 50
"""Units an arm needs before a sequence is shown; the Monte Carlo starts here."""
PLANNED_UNITS = 5000.0
"""The N at which sequences are tightest, where the stop rule names none."""


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
    """Treated − control in the direction that is worse."""
    low: float
    high: float
    """Each a one-sided sequence at α."""
    state: Literal["collecting", "safe", "breached"]


class Sequence(NamedTuple):
    """An estimate of a difference with its two-sided confidence sequence and always-valid p-value."""

    estimate: float
    low: float
    high: float
    p: float


def effect(
    experiment: Experiment, compared: Units, metric: Metric, arm: int, population: Population, alpha: float
) -> Effect:
    """One arm against the control on one metric, at a two-sided α, over the units that are `compared`."""
    control, treated = pair(compared, metric, arm)
    found = sequence(control, treated, planned_units(experiment), alpha)
    return Effect(
        metric.key, experiment.arms[arm].key, population, int(control.n), int(treated.n),
        float(control.mean), float(treated.mean), *found,
    )  # fmt: skip


def guardrail(experiment: Experiment, compared: Units, rail: Guardrail, arm: int) -> GuardrailResult:
    """One arm on one guardrail: `safe` once all of the sequence is below the margin, `breached` once it is above."""
    control, treated = pair(compared, rail.metric, arm)
    estimate, error = _difference(control, treated)
    harm, width = estimate if rail.metric.direction == "decrease" else -estimate, np.inf
    if enough(control, treated):
        rho = rho_for(planned_units(experiment), 2 * experiment.alpha)
        width = float(bound(error, control.n + treated.n, experiment.alpha, rho))
    state: Literal["collecting", "safe", "breached"] = "collecting"
    if harm + width < rail.margin:
        state = "safe"
    elif harm - width > rail.margin:
        state = "breached"
    key = experiment.arms[arm].key
    return GuardrailResult(rail.metric.key, key, rail.margin, harm, harm - width, harm + width, state)


def pair(compared: Units, metric: Metric, arm: int) -> tuple[Moments, Moments]:
    """The moments of the control and of one arm."""
    return floored(compared.moments(metric, 0), compared.moments(metric, arm))


def sequence(control: Moments, treated: Moments, planned: float, alpha: float) -> Sequence:
    """Treated − control, tightest at `planned` units; unbounded without enough units and spread."""
    estimate, error = _difference(control, treated)
    if not enough(control, treated):
        return Sequence(estimate, -np.inf, np.inf, 1.0)
    n, rho = control.n + treated.n, rho_for(planned, alpha)
    width = float(half_width(error, n, alpha, rho))
    return Sequence(estimate, estimate - width, estimate + width, float(p_value(estimate, error, n, rho)))


def planned_units(experiment: Experiment) -> float:
    """The N at which the sequences of an experiment are tightest; fixed with its definition."""
    return float(experiment.stop.max_units or PLANNED_UNITS)


def enough(control: Moments, treated: Moments) -> bool:
    """Whether there are units and spread enough for a sequence."""
    return bool(min(control.n, treated.n) >= MIN_UNITS and min(control.variance, treated.variance) > 0)


def _difference(control: Moments, treated: Moments) -> tuple[float, float]:
    if not (control.n and treated.n):
        return np.nan, np.nan
    estimate, error = difference(control, treated)
    return float(estimate), float(error)
