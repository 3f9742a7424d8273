"""Thousands of experiments of one metric at once, each watched 40 times.

A fixed-horizon z-test watched in the same way stands beside the sequence: what not to do. Shapes: `[arms, runs, looks, units]`.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.server.experiments.effect import PLANNED_UNITS
from trimtab.server.experiments.sequences import Moments, bound, difference, half_width, rho_for, units_needed
from trimtab.server.experiments.values import floored

__all__ = ["KINDS", "LOOKS", "Kind", "Watched", "promised_power", "watch"]

LOOKS = 40
PER_LOOK = 50
"""New units per arm between two looks; the first look is at as many as the analysis asks for at least."""
LATE = 10
"""Looks until the last outcome of a unit is in, where outcomes arrive late."""

Floats = npt.NDArray[Any]


class Kind(NamedTuple):
    """A metric to simulate."""

    says: str
    effect: float
    """One that is worth finding."""


KINDS = {
    "proportion": Kind("proportion, 30 %", 0.08),
    "rare": Kind("proportion, 2 %", 0.03),
    "skewed": Kind("mean, lognormal", 0.25),
    "ratio": Kind("ratio of sums", 0.05),
    "adjusted": Kind("mean, with a covariate that explains two thirds", 0.1),
    "late": Kind("count, its events up to 10 looks late", 0.1),
}


class Watched(NamedTuple):
    """Of all runs, the share in which it ever happened."""

    two_sided: float
    """The sequence excluded 0."""
    one_sided: float
    """The one-sided sequence lay above 0."""
    missed: float
    """The sequence excluded the true effect; where outcomes arrive late, that on the outcomes so far."""
    z_test: float
    """A fixed-horizon test at the same α found something."""


def watch(kind: str, *, effect: float = 0.0, n_runs: int = 1000, alpha: float = 0.05, seed: int = 0) -> Watched:
    """Runs of `LOOKS` looks; `effect` is added to the treated arm."""
    rng = np.random.default_rng(seed)
    control, treated = floored(*_arms(rng, kind, effect, n_runs))
    estimate, error = difference(control, treated)
    n, rho, rho_one = control.n + treated.n, rho_for(PLANNED_UNITS, alpha), rho_for(PLANNED_UNITS, 2 * alpha)
    width = half_width(error, n, alpha, rho)

    def ever(found: Any) -> float:
        return float(found.any(-1).mean())

    return Watched(
        ever(np.abs(estimate) > width),
        ever(estimate > bound(error, n, alpha, rho_one)),
        ever(np.abs(estimate - (effect * _matured() if kind == "late" else effect)) > width),
        ever(np.abs(estimate) > 1.959964 * error),
    )


def promised_power(*, n_runs: int = 1000, alpha: float = 0.05, seed: int = 0) -> tuple[int, float, float]:
    """The units that a power of 0.8 needs for 30 % against 35 %; and the share of runs found at that number, and found by it."""
    rng, rates, rho = np.random.default_rng(seed), np.array([0.3, 0.35]), rho_for(PLANNED_UNITS, alpha)
    needed = units_needed(float(2 * (rates * (1 - rates)).sum()), rates[1] - rates[0], alpha, rho)
    per_look = -(-needed // (2 * LOOKS))
    n = per_look * np.arange(1.0, LOOKS + 1)
    mean = rng.binomial(per_look, rates[:, None, None], (2, n_runs, LOOKS)).cumsum(-1) / n
    estimate, error = difference(*_split(Moments(n, mean, mean * (1 - mean) * n / (n - 1))))
    found = np.abs(estimate) > half_width(error, 2 * n, alpha, rho)
    return needed, float(found[:, -1].mean()), float(found.any(-1).mean())


def _arms(rng: np.random.Generator, kind: str, effect: float, n_runs: int) -> tuple[Moments, Moments]:
    """Moments of both arms at every look, [runs, looks]."""
    shape = (2, n_runs, LOOKS, PER_LOOK)
    shift = np.array([0.0, effect]).reshape(2, 1, 1, 1)
    match kind:
        case "proportion" | "rare":
            rate = 0.3 if kind == "proportion" else 0.02
            return _means((rng.random(shape, np.float32) < rate + shift).astype(np.float64))
        case "skewed":
            return _means(rng.lognormal(0.0, 1.0, shape) + shift)
        case "ratio":
            turns = 1.0 + rng.poisson(3.0, shape)
            return _ratio(rng.poisson(turns * 0.5) + shift * turns, turns)
        case "adjusted":
            before = rng.normal(size=shape)
            return _adjusted(before + 0.7 * rng.normal(size=shape) + shift, before)
        case "late":
            return _late(rng, effect, n_runs)
        case _:
            raise ValueError(f"{kind} is none of {', '.join(KINDS)}")


def _means(y: Floats) -> tuple[Moments, Moments]:
    return _of_sums(_sums(y), _sums(y * y))


def _of_sums(s: Floats, ss: Floats) -> tuple[Moments, Moments]:
    n = _n()
    return _split(Moments(n, s / n, (ss - s * s / n) / (n - 1)))


def _ratio(num: Floats, den: Floats) -> tuple[Moments, Moments]:
    n = _n()
    s_num, s_den = _sums(num), _sums(den)
    ratio = s_num / s_den
    squares = _sums(num * num) - 2 * ratio * _sums(num * den) + ratio**2 * _sums(den * den)
    return _split(Moments(n, ratio, squares / (n - 1) / (s_den / n) ** 2))


def _adjusted(y: Floats, x: Floats) -> tuple[Moments, Moments]:
    n = _n()
    my, mx = _sums(y) / n, _sums(x) / n
    cxx, cxy, cyy = _sums(x * x) - n * mx * mx, _sums(x * y) - n * mx * my, _sums(y * y) - n * my * my
    total_xx, total_xy = (_sums(v).sum(0) - 2 * n * mx.mean(0) * m.mean(0) for v, m in ((x * x, mx), (x * y, my)))
    theta = total_xy / total_xx
    variance = (cyy - 2 * theta * cxy + theta**2 * cxx) / (n - 1)
    return _split(Moments(n, my - theta * (mx - mx.mean(0)), variance))


def _late(rng: np.random.Generator, effect: float, n_runs: int) -> tuple[Moments, Moments]:
    """A unit's value goes on growing after it was first looked at: LATE events, one a look, with this effect on their sum."""
    rate = np.array([0.05, 0.05 + effect / LATE], np.float32).reshape(2, 1, 1, 1, 1)
    s, ss = np.zeros((2, n_runs, LOOKS)), np.zeros((2, n_runs, LOOKS))
    for arrival in range(LOOKS):
        so_far = (rng.random((2, n_runs, 1, PER_LOOK, LATE), np.float32) < rate).cumsum(-1)[:, :, 0]
        age = np.minimum(np.arange(LOOKS - arrival), LATE - 1)
        s[:, :, arrival:] += so_far.sum(2)[:, :, age]
        ss[:, :, arrival:] += (so_far**2).sum(2)[:, :, age]
    return _of_sums(s, ss)


def _matured() -> Floats:
    """At each look, the share of a late effect that is in."""
    age = np.arange(LOOKS)[:, None] - np.arange(LOOKS)
    return np.array([np.clip(row[row >= 0] + 1, 0, LATE).mean() / LATE for row in age])


def _sums(values: Floats) -> Floats:
    return np.asarray(values.sum(-1).cumsum(-1))


def _n() -> Floats:
    return PER_LOOK * np.arange(1.0, LOOKS + 1)


def _split(both: Moments) -> tuple[Moments, Moments]:
    mean, variance = np.asarray(both.mean), np.asarray(both.variance)
    return Moments(both.n, mean[0], variance[0]), Moments(both.n, mean[1], variance[1])
