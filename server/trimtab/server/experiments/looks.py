"""How the sequences of the primary metric narrowed: the results at moments from the first unit to the last, for a plot.

Each look is over the units enrolled by then, with what is known of them today; it needs one reading of the database, whatever
their number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trimtab.server.experiments.analysis import primary_alpha
from trimtab.server.experiments.definition import Experiment
from trimtab.server.experiments.effect import Effect, effect
from trimtab.server.experiments.sample import Units

__all__ = ["MAX_LOOKS", "Look", "looks"]

MAX_LOOKS = 200


class Look(NamedTuple):
    """The primary metric at one moment."""

    at: str
    """When its last unit was enrolled."""
    n_units: tuple[int, ...]
    """Per arm."""
    effects: tuple[Effect, ...]
    """Per treated arm, by intent to treat."""


def looks(experiment: Experiment, units: Units, enrolled_at: Sequence[str], count: int) -> tuple[Look, ...]:
    """At most `count` looks, after equally many units each."""
    order = np.argsort(np.array(enrolled_at, dtype=str), kind="stable")
    ends = sorted({len(order) * (k + 1) // count for k in range(count)} - {0})
    found = []
    for end in ends:
        chosen_U = np.zeros(len(order), bool)
        chosen_U[order[:end]] = True
        so_far = units.of(chosen_U)
        effects = tuple(
            effect(
                experiment, so_far.compared(arm, "intent_to_treat"), experiment.primary, arm, "intent_to_treat",
                primary_alpha(experiment),
            )
            for arm in range(1, len(experiment.arms))
        )  # fmt: skip
        found.append(Look(enrolled_at[order[end - 1]], so_far.counts(len(experiment.arms)), effects))
    return tuple(found)
