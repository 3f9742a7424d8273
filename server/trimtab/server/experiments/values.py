"""One number per unit of randomisation, from what was measured of it: what means, proportions and ratios have in common.

mean         y = Σ outcomes of the unit
proportion   y = 1 if any outcome is above 0
ratio        R = Σ num ÷ Σ den within the arm;  y = R + (num − R den) / mean(den): R, with the variance of the delta method
             (Deng, Knoblich and Lu 2018, "Applying the Delta Method in Metric Analytics", eq. 4)
adjusted     y − θ (x − x̄), θ = cov(y, x) / var(x), x̄ and θ pooled over the arms: the CUPED estimator of Deng, Xu, Kohavi and
             Walker (2013, §3.2), with x measured before the unit's first exposure; x̄ for a unit without one

Without spread in one arm (a rare outcome that has not happened there yet) its variance is estimated as 0, and a difference would
look certain. `floored` then takes the variance of both arms pooled, about their common mean: it is consistent where the arms are
alike and too large where they are not, and it lets an arm in which a harm always happens be told from one in which it never does.
"""

import numpy as np
import numpy.typing as npt

from trimtab.server.experiments.sequences import Moments

__all__ = ["adjusted", "floored", "moments", "ratio_values"]

Floats = npt.NDArray[np.float64]


def moments(y_U: Floats) -> Moments:
    """Count, mean and variance (n − 1) of the units' values; the variance of fewer than two is not a number."""
    n = len(y_U)
    return Moments(n, float(y_U.mean()) if n else np.nan, float(y_U.var(ddof=1)) if n > 1 else np.nan)


def ratio_values(num_U: Floats, den_U: Floats) -> Floats:
    """The linearised values of one arm; not a number where the denominators sum to 0."""
    total = den_U.sum()
    if total == 0:
        return np.full(len(num_U), np.nan)
    ratio = num_U.sum() / total
    return np.asarray(ratio + (num_U - ratio * den_U) / den_U.mean())


def adjusted(y_U: Floats, x_U: Floats) -> Floats:
    """The values of all arms with what the covariate explains taken out; as they are if it explains nothing.

    A covariate that is not a number is a unit without one.
    """
    known = ~np.isnan(x_U)
    if not known.any():
        return y_U
    dx_U = np.where(known, x_U - x_U[known].mean(), 0.0)
    spread = float(dx_U @ dx_U)
    return y_U - float(dx_U @ y_U) / spread * dx_U if spread else y_U


def floored(control: Moments, treated: Moments) -> tuple[Moments, Moments]:
    """The same, with the pooled variance for an arm that shows none; as they are with fewer than two units. Broadcasts."""
    if np.min(control.n) < 2 or np.min(treated.n) < 2:
        return control, treated
    n = control.n + treated.n
    gap = treated.mean - control.mean
    within = (control.n - 1) * control.variance + (treated.n - 1) * treated.variance
    pooled = (within + control.n * treated.n / n * gap**2) / (n - 1)
    rounding = 1e-18 * np.maximum(np.square(control.mean), np.square(treated.mean))
    pooled = np.where(pooled > rounding, pooled, 0.0)
    return (
        control._replace(variance=np.where(control.variance > rounding, control.variance, pooled)),
        treated._replace(variance=np.where(treated.variance > rounding, treated.variance, pooled)),
    )
