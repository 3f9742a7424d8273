"""What is deleted, and when: measurements of experiments that are purged, texts past their days, outcomes of nobody's replies.

    purge     an archived experiment's exposures, outcomes, tallies and texts, when somebody asks for it, or `purge_after_days`
              after it was archived; never by default. Its definition, its trail and its key stay.

The change is made first, and from then on nobody is shown what was measured; the rows go in batches after it, so that no lock is
held for long. Whatever is left, by a crash or by a reply that came in late, goes at the next hourly look of any replica.

An outcome of a unit goes with the unit's last exposure: it is another experiment's as well. One that was told of a unit which no
experiment has seen stays.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

import sqlalchemy as sa

from trimtab.server.database.database import Database, utc_now
from trimtab.server.database.schema import experiment, experiment_tally, exposure, outcome
from trimtab.server.experiments.errors import ExperimentState, StaleRevision
from trimtab.server.experiments.outcomes import Outcomes
from trimtab.server.experiments.store import ACTOR, Experiments
from trimtab.server.experiments.texts import Texts

__all__ = ["Retention"]

EVERY_SECONDS = 3600.0
BATCH = 1_000


class Retention:
    """Deletes, from one database; all functions block."""

    def __init__(
        self,
        database: Database,
        experiments: Experiments,
        outcomes: Outcomes,
        texts: Texts,
        *,
        purge_after_days: float | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._experiments = experiments
        self._outcomes = outcomes
        self._texts = texts
        self._purge_after_days = purge_after_days
        self._clock = clock

    def look(self) -> float:
        """Deletes all that is to go by now; seconds until it should look again."""
        now = self._clock()
        self._outcomes.forget_pending(now=now)
        self._texts.forget(now=now)
        self._purge_archived(now)
        self.sweep()
        return EVERY_SECONDS

    def sweep(self) -> int:
        """How many rows of purged experiments there were, and are no more."""
        left = [sa.exists().where(table.c.experiment == experiment.c.key) for table in (exposure, experiment_tally)]
        purged = sa.select(experiment.c.key).where(experiment.c.state == "purged", sa.or_(*left))
        with self._database.read() as connection:
            keys = connection.execute(purged).scalars().all()
        return sum(self.delete(key) for key in keys)

    def delete(self, key: str) -> int:
        """How many rows of a purged experiment there were, and are no more."""
        n = 0
        while batch := self._delete_batch(key):
            n += batch
        with self._database.append() as connection:
            connection.execute(experiment_tally.delete().where(experiment_tally.c.experiment == key))
        return n

    def _purge_archived(self, now: datetime) -> None:
        days = self._purge_after_days
        if days is None:
            return
        for record in self._experiments.list(state="archived"):
            if now - record.changed_at < timedelta(days=days):
                continue
            key, reason = record.definition.key, f"it was archived {days:g} days ago (purge_after_days)"
            try:
                self._experiments.change(key, "purge", actor=ACTOR, reason=reason, revision=record.revision)
            except (StaleRevision, ExperimentState):
                continue  # Another replica was quicker.

    def _delete_batch(self, key: str) -> int:
        of_replies = sa.select(exposure.c.response_id, exposure.c.unit).where(exposure.c.experiment == key)
        # By all keys, as the index of units begins with the experiment.
        is_seen = sa.exists().where(
            exposure.c.experiment.in_(sa.select(experiment.c.key)), exposure.c.unit == outcome.c.subject
        )
        with self._database.append() as connection:
            rows = connection.execute(of_replies.limit(BATCH)).all()
            if not rows:
                return 0
            replies, units = [row.response_id for row in rows], {row.unit for row in rows}
            deletions = (
                outcome.delete().where(outcome.c.subject.in_(replies)),
                exposure.delete().where(exposure.c.response_id.in_(replies)),
                outcome.delete().where(outcome.c.subject.in_(units), ~is_seen),
            )
            return sum(connection.execute(deletion).rowcount for deletion in deletions)
