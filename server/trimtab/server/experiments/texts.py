"""Sampled texts: what was asked and answered in a share of the replies of an experiment whose definition has `text`.

    sampled ──► the queue of exposures ──► table `sampled_text` ──► read, each page audited ──► deleted after its days

A text is deleted `days` after its request, or with the archiving of its experiment. From then on nobody is shown it; its row goes
at the next look of any replica that forgets (`retention`), once an hour. SQLite writes zeros over what is deleted; backups are
whoever made them's to delete.
"""

from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa

from trimtab.server.database.database import Database, text_of, utc_now
from trimtab.server.database.schema import experiment, sampled_text
from trimtab.server.experiments.definition import TextSampling

__all__ = ["MAX_CHARACTERS", "SampledText", "Texts", "delete_texts", "sampled"]

MAX_CHARACTERS = 8_000
"""Of a prompt, and of a reply; what is longer is cut, and says so."""


class SampledText(NamedTuple):
    """One prompt and its reply."""

    response_id: str
    experiment: str
    arm: str
    at: str
    until: str
    """When it is deleted."""
    prompt: str
    """The prompt of the request, or the last turn of its user: nothing that the arm put in front."""
    reply: str
    """As generated; the first of several samples."""
    cut: bool
    """One of them was longer than MAX_CHARACTERS."""


def sampled(
    sampling: TextSampling, *, response_id: str, experiment: str, arm: str, at: str, prompt: str, reply: str
) -> SampledText:
    """The text as it is kept; `at` is when its request came."""
    until = text_of(datetime.fromisoformat(at) + timedelta(days=sampling.days))
    cut = max(len(prompt), len(reply)) > MAX_CHARACTERS
    return SampledText(response_id, experiment, arm, at, until, _storable(prompt), _storable(reply), cut)


class Texts:
    """The sampled texts of one database; all functions block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, key: str, *, after: str, limit: int, actor: str) -> list[dict[str, Any]]:
        """Texts of an experiment by response id, those after one; the audit log tells who has read how many."""
        with self._database.change(actor) as change:
            query = (
                sa.select(sampled_text)
                .where(sampled_text.c.experiment == key, sampled_text.c.response_id > after)
                .where(sampled_text.c.until > change.at)
                .order_by(sampled_text.c.response_id)
                .limit(limit)
            )
            rows = [dict(row) for row in change.connection.execute(query).mappings()]
            change.record("experiment.texts", key, {"after": after, "count": len(rows)})
        return rows

    def forget(self, *, now: datetime | None = None) -> int:
        """How many were past their days, or of an experiment that was put away, and are gone."""
        away = sa.select(experiment.c.key).where(experiment.c.state.in_(("archived", "purged")))
        over = sa.or_(sampled_text.c.until <= text_of(now or utc_now()), sampled_text.c.experiment.in_(away))
        with self._database.append() as connection:
            return connection.execute(sampled_text.delete().where(over)).rowcount


def delete_texts(connection: sa.Connection, key: str) -> int:
    """How many of an experiment there were."""
    return connection.execute(sampled_text.delete().where(sampled_text.c.experiment == key)).rowcount


def _storable(text: str) -> str:
    """Its beginning, without what a database takes for no text: NULs and halves of surrogate pairs."""
    return text[:MAX_CHARACTERS].replace("\0", "\ufffd").encode("utf-8", "replace").decode()
