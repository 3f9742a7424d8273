"""Looks after experiments: rolls them back when they harm, stops them when they are over, ramps them up.

Every replica has one. None of them leads: a change names the revision that it was decided on, so of two that decide alike one is
told that it is late, and the clock of any of them may be wrong without more than a hold that is kept too long.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime

from trimtab.server.database.database import utc_now
from trimtab.server.errors import TrimtabError
from trimtab.server.experiments.documents import results_of
from trimtab.server.experiments.errors import ExperimentState, StaleRevision
from trimtab.server.experiments.lifecycle import Record
from trimtab.server.experiments.measurements import Measurements
from trimtab.server.experiments.safety import Advice, advise
from trimtab.server.experiments.store import ACTOR, Experiments

__all__ = ["Keeper"]

MAX_REASON = 1000
SHARE = 0.05
"""Of its time that a replica spends on looking, at most."""
log = logging.getLogger("trimtab")


class Keeper:
    """Looks, when it is told to; all functions block."""

    def __init__(
        self,
        experiments: Experiments,
        measurements: Measurements,
        *,
        every_seconds: float,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._experiments = experiments
        self._measurements = measurements
        self._every_seconds = every_seconds
        self._clock = clock

    def look(self) -> float:
        """Seconds until it should look again."""
        start = time.monotonic()
        for state in ("running", "paused"):
            for record in self._experiments.list(state=state):
                try:
                    self._look_at(record)
                except TrimtabError as e:
                    log.error("experiment %s cannot be looked at: %s", record.definition.key, e.message)
        return max(self._every_seconds, (time.monotonic() - start) / SHARE)

    def _look_at(self, record: Record) -> None:
        now = self._clock()
        measured = self._measurements.read(record)
        advice = advise(record, results_of(record, measured, now), measured.arms, measured.tallies, now)
        if advice.action is not None:
            self._follow(record, advice)

    def _follow(self, record: Record, advice: Advice) -> None:
        if advice.action is None:
            return
        key, reason = record.definition.key, advice.reason[:MAX_REASON]
        try:
            self._experiments.change(key, advice.action, actor=ACTOR, reason=reason, revision=record.revision)
        except (StaleRevision, ExperimentState):
            return  # Somebody else was quicker.
        level = logging.ERROR if advice.action == "rollback" else logging.WARNING
        log.log(level, "experiment %s: %s (%s)", key, advice.action, reason)
