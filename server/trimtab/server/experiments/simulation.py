"""How often the analysis errs, by Monte Carlo: `python -m trimtab.server.experiments.simulation`.

Thousands of experiments at once, each watched 40 times: under no effect (A/A) the share that ever looks decided must not exceed
α; an injected effect and an injected 53/47 split must be found. A fixed-horizon z-test watched in the same way stands beside it.
"""

import json
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.server.experiments.analysis import PLANNED_UNITS, SAMPLE_RATIO_ALPHA
from trimtab.server.experiments.sequences import Moments, bound, difference, half_width, rho_for, sample_ratio_p

__all__ = ["KINDS", "Watched", "sample_ratio_alarms", "watch"]

LOOKS = 40
KINDS = ("proportion", "rare", "skewed", "ratio", "adjusted")

Floats = npt.NDArray[Any]


class Watched(NamedTuple):
    """Of all runs, the share in which something was ever concluded."""

    two_sided: float
    one_sided: float
    z_test: float
    """A fixed-horizon test looked at as often: what not to do."""


def watch(
    kind: str, *, effect: float = 0.0, n_runs: int = 1000, per_look: int = 50, alpha: float = 0.05, seed: int = 0
) -> Watched:
    """Runs of `LOOKS` looks with `per_look` new units per arm and look; `effect` is added to the treated arm."""
    rng = np.random.default_rng(seed)
    control, treated = _arms(rng, kind, effect, n_runs, per_look)
    estimate, error = difference(control, treated)
    n, rho = control.n + treated.n, rho_for(PLANNED_UNITS, alpha)
    return Watched(
        float((np.abs(estimate) > half_width(error, n, alpha, rho)).any(-1).mean()),
        float((estimate > bound(error, n, alpha, rho)).any(-1).mean()),
        float((np.abs(estimate) > 1.959964 * error).any(-1).mean()),
    )


def sample_ratio_alarms(
    share: float, *, n_runs: int = 1000, per_look: int = 500, alpha: float = SAMPLE_RATIO_ALPHA, seed: int = 0
) -> tuple[float, float]:
    """The share of runs that ever alarm when the first of two arms, meant to get half, gets `share`; the median units by then."""
    rng = np.random.default_rng(seed)
    first = rng.binomial(per_look, share, (n_runs, LOOKS)).cumsum(-1)
    total = per_look * np.arange(1, LOOKS + 1)
    counts = np.stack([first, total - first], -1)
    alarm = sample_ratio_p(counts[:, :, None, :], np.array([[0.5, 0.5]])) <= alpha
    caught = alarm.any(-1)
    when = per_look * (alarm.argmax(-1) + 1.0)
    return float(caught.mean()), float(np.median(when[caught])) if caught.any() else float("nan")


def _arms(rng: np.random.Generator, kind: str, effect: float, n_runs: int, per_look: int) -> tuple[Moments, Moments]:
    """Moments of both arms at every look, [runs, looks]."""
    shape = (2, n_runs, LOOKS, per_look)
    shift = np.array([0.0, effect]).reshape(2, 1, 1, 1)
    match kind:
        case "proportion" | "rare":
            rate = 0.3 if kind == "proportion" else 0.02
            y = (rng.random(shape, np.float32) < rate + shift).astype(np.float64)
        case "skewed":
            y = rng.lognormal(0.0, 1.0, shape) + shift
        case "ratio":
            turns = 1.0 + rng.poisson(3.0, shape)
            return _ratio(rng.poisson(turns * 0.5) + shift * turns, turns)
        case "adjusted":
            before = rng.normal(size=shape)
            return _adjusted(before + 0.7 * rng.normal(size=shape) + shift, before)
        case _:
            raise ValueError(f"{kind} is none of {', '.join(KINDS)}")
    n, s, ss = _n(per_look), _sums(y), _sums(y * y)
    both = Moments(n, s / n, (ss - s * s / n) / (n - 1))
    return _split(both)


def _ratio(num: Floats, den: Floats) -> tuple[Moments, Moments]:
    n = _n(num.shape[-1])
    s_num, s_den = _sums(num), _sums(den)
    ratio = s_num / s_den
    squares = _sums(num * num) - 2 * ratio * _sums(num * den) + ratio**2 * _sums(den * den)
    return _split(Moments(n, ratio, squares / (n - 1) / (s_den / n) ** 2))


def _adjusted(y: Floats, x: Floats) -> tuple[Moments, Moments]:
    n = _n(y.shape[-1])
    my, mx = _sums(y) / n, _sums(x) / n
    cxx, cxy, cyy = _sums(x * x) - n * mx * mx, _sums(x * y) - n * mx * my, _sums(y * y) - n * my * my
    total_xx, total_xy = (_sums(v).sum(0) - 2 * n * mx.mean(0) * m.mean(0) for v, m in ((x * x, mx), (x * y, my)))
    theta = total_xy / total_xx
    variance = (cyy - 2 * theta * cxy + theta**2 * cxx) / (n - 1)
    return _split(Moments(n, my - theta * (mx - mx.mean(0)), variance))


def _sums(values: Floats) -> Floats:
    return np.asarray(values.sum(-1).cumsum(-1))


def _n(per_look: int) -> Floats:
    return per_look * np.arange(1.0, LOOKS + 1)


def _split(both: Moments) -> tuple[Moments, Moments]:
    mean, variance = np.asarray(both.mean), np.asarray(both.variance)
    return Moments(both.n, mean[0], variance[0]), Moments(both.n, mean[1], variance[1])


def figures(n_runs: int = 2000) -> dict[str, Any]:
    """All figures of the documentation."""
    effects = {"proportion": 0.08, "rare": 0.03, "skewed": 0.25, "ratio": 0.05, "adjusted": 0.1}
    caught, when = sample_ratio_alarms(0.53, n_runs=n_runs)
    return {
        "n_runs": n_runs,
        "looks": LOOKS,
        "units": 2 * 50 * LOOKS,
        "no_effect": {kind: watch(kind, n_runs=n_runs)._asdict() for kind in KINDS},
        "effect": {
            kind: {"effect": e, **watch(kind, effect=e, n_runs=n_runs)._asdict()} for kind, e in effects.items()
        },
        "sample_ratio": {
            "50/50 alarms": sample_ratio_alarms(0.5, n_runs=n_runs)[0],
            "53/47 caught": caught,
            "53/47 median units": when,
        },
    }


if __name__ == "__main__":
    json.dump(figures(), sys.stdout, indent=1)
