"""What the analysis reads: one row per unit of randomisation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.server.experiments.definition import Metric
from trimtab.server.experiments.sequences import Moments
from trimtab.server.experiments.values import adjusted, moments, ratio_values

__all__ = ["POPULATIONS", "Population", "Units"]

Population = Literal["intent_to_treat", "triggered", "per_protocol"]
POPULATIONS: tuple[Population, ...] = ("intent_to_treat", "triggered", "per_protocol")

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Units:
    """One row per exposed unit; forced arms and units seen in two arms are not among them."""

    arm_U: npt.NDArray[np.int64]
    """Index of the arm."""
    triggered_U: Bools
    """Whether its generation was, or would have been, altered."""
    complied_U: Bools
    """Whether it always got what its arm gives."""
    outcomes: Mapping[str, Floats]
    """Per outcome, the unit's sum since its first exposure; not a number for a unit that nothing was reported of."""
    covariates: Mapping[str, Floats] = field(default_factory=dict)
    """Per outcome, the unit's sum before its first exposure, likewise."""

    def compared(self, arm: int, population: Population) -> "Units":
        """The units of the control and of one arm that are of the population."""
        chosen_U = (self.arm_U == 0) | (self.arm_U == arm)
        match population:
            case "intent_to_treat":
                pass
            case "triggered":
                chosen_U &= self.triggered_U
            case "per_protocol":
                chosen_U &= self.complied_U
        return self.of(chosen_U)

    def of(self, chosen_U: Bools) -> "Units":
        """The chosen rows."""
        return Units(
            self.arm_U[chosen_U],
            self.triggered_U[chosen_U],
            self.complied_U[chosen_U],
            {key: values[chosen_U] for key, values in self.outcomes.items()},
            {key: values[chosen_U] for key, values in self.covariates.items()},
        )

    def counts(self, n_arms: int) -> tuple[int, ...]:
        """Units per arm."""
        return tuple(int(n) for n in np.bincount(self.arm_U, minlength=n_arms))

    def outcome(self, key: str) -> Floats:
        """The sums of one outcome; 0 for a unit of which nothing was reported: leaving it out would compare whoever happened to
        report."""
        values_U = self.outcomes.get(key)
        return np.zeros(len(self.arm_U)) if values_U is None else np.where(np.isnan(values_U), 0.0, values_U)

    def reported(self, outcome: str) -> Bools:
        """Of which units the outcome was reported at all."""
        values_U = self.outcomes.get(outcome)
        return np.zeros(len(self.arm_U), bool) if values_U is None else ~np.isnan(values_U)

    def moments(self, metric: Metric, arm: int) -> Moments:
        """Of a metric in one arm; the covariate's part is that of all units here, so choose the compared ones first."""
        of = self.arm_U == arm
        y_U = self.outcome(metric.outcome)
        match metric.kind:
            case "ratio":
                return moments(ratio_values(y_U[of], self.outcome(str(metric.denominator))[of]))
            case "proportion":
                y_U = (y_U > 0).astype(np.float64)
            case "mean":
                pass
        if metric.covariate is not None and metric.covariate in self.covariates:
            y_U = adjusted(y_U, self.covariates[metric.covariate])
        return moments(y_U[of])
