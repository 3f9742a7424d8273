"""How often, and how soon, the sample-ratio test alarms: at an honest split, and at one that is not."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.monte_carlo.watched import LOOKS
from trimtab.server.experiments.analysis import SAMPLE_RATIO_ALPHA
from trimtab.server.experiments.sequences import sample_ratio_p

__all__ = ["Alarms", "alarms"]

PER_LOOK = 500
RAMP = np.repeat([0, 1, 2], [10, 15, 15])
"""Which stretch each look is of, in an experiment that is ramped twice."""


class Alarms(NamedTuple):
    """Of all runs."""

    share: float
    """That ever alarmed."""
    units: float
    """Median number of units at the first alarm, of those."""


def alarms(first: float, *, n_runs: int = 1000, seed: int = 0) -> Alarms:
    """Two arms meant to get half each, of which the first gets `first`; ramped, so that the test sees three stretches."""
    rng = np.random.default_rng(seed)
    counts: npt.NDArray[np.int64] = rng.binomial(PER_LOOK, first, (n_runs, LOOKS))
    in_stretch = np.zeros((n_runs, LOOKS, RAMP.max() + 1, 2))
    for look in range(LOOKS):
        in_stretch[:, look:, RAMP[look], 0] += counts[:, look, None]
        in_stretch[:, look:, RAMP[look], 1] += PER_LOOK - counts[:, look, None]
    alarm = sample_ratio_p(in_stretch, np.full((RAMP.max() + 1, 2), 0.5)) <= SAMPLE_RATIO_ALPHA
    caught = alarm.any(-1)
    when = PER_LOOK * (alarm.argmax(-1) + 1.0)
    return Alarms(float(caught.mean()), float(np.median(when[caught])) if caught.any() else float("nan"))
