"""One number per unit of randomisation, from what was measured of it: what means, proportions and ratios have in common.

mean         y = Σ outcomes of the unit
proportion   y = 1 if any outcome is above 0
ratio        R = Σ num ÷ Σ den within the arm;  y = R + (num − R den) / mean(den): R, with the variance of the delta method
             (Deng, Knoblich and Lu 2018, "Applying the Delta Method in Metric Analytics", eq. 4)
adjusted     y − θ (x − x̄), θ = cov(y, x) / var(x), x̄ and θ pooled over the arms: the CUPED estimator of Deng, Xu, Kohavi and
             Walker (2013, §3.2), with x measured before the unit's first exposure
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.server.experiments.sequences import Moments

__all__ = ["adjusted", "moments", "ratio_values"]

Floats = npt.NDArray[np.float64]


def moments(y_U: Floats, kind: Literal["mean", "proportion"] = "mean") -> Moments:
    """Count, mean and variance (n − 1) of the units' values; the variance of fewer than two is not a number."""
    values = (y_U > 0).astype(np.float64) if kind == "proportion" else y_U
    n = len(values)
    return Moments(n, float(values.mean()) if n else np.nan, float(values.var(ddof=1)) if n > 1 else np.nan)


def ratio_values(num_U: Floats, den_U: Floats) -> Floats:
    """The linearised values of one arm; not a number where the denominators sum to 0."""
    total = den_U.sum()
    if total == 0:
        return np.full(len(num_U), np.nan)
    ratio = num_U.sum() / total
    return np.asarray(ratio + (num_U - ratio * den_U) / den_U.mean())


def adjusted(y_U: Floats, x_U: Floats) -> Floats:
    """The values of all arms with what the covariate explains taken out; as they are if it explains nothing."""
    dx_U = x_U - x_U.mean()
    spread = float(dx_U @ dx_U)
    return y_U - float(dx_U @ y_U) / spread * dx_U if spread else y_U
