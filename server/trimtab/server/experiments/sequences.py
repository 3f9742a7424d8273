"""Intervals and p-values that hold at every look: asymptotic confidence sequences, and the sequential sample-ratio test.

Everything broadcasts over numpy arrays, so that a thousand experiments are one call (`simulation`).

With N units so far in both arms, an estimate of standard error s and σ² = N s², Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas
(2021, arXiv 2103.06476), for a ρ > 0 fixed beforehand:

    two-sided, eq. 9     estimate ± σ √( 2(Nρ² + 1) / (N²ρ²) · log( √(Nρ² + 1) / α ) )
    one-sided, eq. 134   estimate − σ √( 2(Nρ² + 1) / (N²ρ²) · log( 1 + √(Nρ² + 1) / 2α ) )
    p-value, eq. 155     1 / e,  e = exp( ρ² (estimate/s)² N / (2(Nρ² + 1)) ) / √(Nρ² + 1)

ρ only says at which N the interval is narrowest relative to its limit; for N* units, ρ² = (−2 log α + log(1 − 2 log α)) / N*
(eq. 161), with 2α for α where one side is asked about.

Lindon and Malek (2022, arXiv 2011.03567): counts against shares θ₀, a Dirichlet(c θ₀) for the alternative; the Bayes factor of
the counts is a martingale under θ₀, so P(ever 1/BF ≤ α) ≤ α. Where the shares change (a ramp cuts buckets differently), the
factors of the stretches multiply, each with the counts before it in its prior.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, ndtr, xlogy

__all__ = [
    "Moments",
    "bound",
    "difference",
    "half_width",
    "p_value",
    "power",
    "rho_for",
    "sample_ratio_p",
    "units_needed",
]

Floats = npt.NDArray[np.float64]
FloatLike = Any
"""A float, or an array of them."""

CONCENTRATION = 10_000.0
"""Of the alternative's Dirichlet: how near to the shares a mismatch is expected; the published default."""


class Moments(NamedTuple):
    """What is known of one arm: units, and the mean and variance (n − 1) of their values."""

    n: FloatLike
    mean: FloatLike
    variance: FloatLike


def rho_for(n_units: float, alpha: float) -> float:
    """The ρ whose sequence is tightest at `n_units` (eq. 161's approximation)."""
    return float(np.sqrt((-2 * np.log(alpha) + np.log(1 - 2 * np.log(alpha))) / n_units))


def difference(control: Moments, treated: Moments) -> tuple[FloatLike, FloatLike]:
    """Treated − control, and its standard error (unequal variances)."""
    return treated.mean - control.mean, np.sqrt(control.variance / control.n + treated.variance / treated.n)


def half_width(error: FloatLike, n: FloatLike, alpha: float, rho: float) -> FloatLike:
    """Half the width of the two-sided sequence, for a standard error at `n` units in both arms."""
    nr2 = np.asarray(n) * rho**2
    width: FloatLike = error * np.sqrt(2 * (nr2 + 1) / nr2 * np.log(np.sqrt(nr2 + 1) / alpha))
    return width


def bound(error: FloatLike, n: FloatLike, alpha: float, rho: float) -> FloatLike:
    """How far the one-sided sequence lies from the estimate."""
    nr2 = np.asarray(n) * rho**2
    width: FloatLike = error * np.sqrt(2 * (nr2 + 1) / nr2 * np.log1p(np.sqrt(nr2 + 1) / (2 * alpha)))
    return width


def p_value(estimate: FloatLike, error: FloatLike, n: FloatLike, rho: float) -> FloatLike:
    """The always-valid p-value of "no difference": at most α exactly where the two-sided sequence excludes 0."""
    nr2 = np.asarray(n) * rho**2
    with np.errstate(divide="ignore", invalid="ignore"):
        log_e = nr2 / (2 * (nr2 + 1)) * (np.asarray(estimate) / error) ** 2 - np.log(nr2 + 1) / 2
    p: FloatLike = np.exp(-np.maximum(log_e, 0.0))
    return p


def sample_ratio_p(counts_EK: npt.ArrayLike, shares_EK: npt.ArrayLike, concentration: float = CONCENTRATION) -> Floats:
    """The p-value that the counts per arm come from the shares, valid at every look; one row for each stretch of equal shares.

    Leading axes are separate experiments.
    """
    counts, shares = np.asarray(counts_EK, float), np.asarray(shares_EK, float)
    before = np.cumsum(counts, -2) - counts
    prior = concentration * shares + before
    log_factor = (
        gammaln(prior.sum(-1))
        - gammaln((prior + counts).sum(-1))
        + (gammaln(prior + counts) - gammaln(prior) - xlogy(counts, shares)).sum(-1)
    ).sum(-1)
    return np.asarray(np.exp(-np.maximum(log_factor, 0.0)))


def power(variance: FloatLike, effect: float, n: FloatLike, alpha: float, rho: float) -> FloatLike:
    """The probability that the two-sided sequence excludes 0 at `n` units in both arms, if the effect is `effect`.

    `variance` is σ² = N s². It may have excluded 0 before, and that counts too: of a watched experiment this is a lower bound.
    """
    error = np.sqrt(np.asarray(variance) / n)
    width = half_width(error, n, alpha, rho)
    found: FloatLike = ndtr((abs(effect) - width) / error) + ndtr(-(abs(effect) + width) / error)
    return found


def units_needed(variance: float, effect: float, alpha: float, rho: float, target: float = 0.8) -> int:
    """Units in both arms together at which `power` is at least `target`."""
    if variance <= 0:
        return 0
    low, high = 1, 2
    while power(variance, effect, high, alpha, rho) < target:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(variance, effect, middle, alpha, rho) < target else (low, middle)
    return high
