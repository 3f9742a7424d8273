"""Default steering: what a request that does not say is steered by.

    alias   requests whose `model` is this name: the served model, under another name
    key     requests of this key, by its public part
    fleet   all requests

The first of these that is there counts, in this order. A request that says `{"steering": {"opt_out": true}}`, or brings its own
steering where a default applies, needs a key whose policy allows it.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from trimtab.server.database.database import Database
from trimtab.server.database.schema import steering_default as table
from trimtab.server.errors import InvalidRequest, NotFound, Violation
from trimtab.server.steering import Steering, parse_steering

__all__ = ["Default", "DefaultSteering", "Defaults", "Kind", "defaults_of"]

Kind = Literal["fleet", "key", "alias"]
_SUBJECTS = {"fleet": r"", "key": r"[a-z2-7]{10}", "alias": r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}"}


@dataclass(frozen=True)
class Default:
    """One default."""

    kind: Kind
    subject: str
    """The key's public part, the alias; empty for the fleet."""
    steering: Steering

    @property
    def document(self) -> dict[str, Any]:
        """As it is shown."""
        return {**vars(self), "steering": self.steering.model_dump(mode="json", exclude_unset=True)}


@dataclass(frozen=True)
class Defaults:
    """All defaults of a fleet."""

    by_subject: dict[tuple[Kind, str], Default]

    def aliases(self) -> tuple[str, ...]:
        """Names that requests may give as `model`."""
        return tuple(subject for kind, subject in self.by_subject if kind == "alias")

    def find(self, *, key_id: str | None, alias: str | None) -> Default | None:
        """The one that counts for a request."""
        candidates: list[tuple[Kind, str]] = [("fleet", "")]
        if key_id is not None:
            candidates.insert(0, ("key", key_id))
        if alias is not None:
            candidates.insert(0, ("alias", alias))
        return next((self.by_subject[c] for c in candidates if c in self.by_subject), None)


class DefaultSteering:
    """The defaults in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, kind: Kind, subject: str, steering: Any, *, actor: str, reason: str = "") -> Default:
        """The default from now on; `steering` is a `steering` field.

        Raises:
            InvalidRequest: no such subject.
            InvalidSteering: the steering is no valid field.
        """
        if kind not in _SUBJECTS or not re.fullmatch(_SUBJECTS[kind], subject):
            raise InvalidRequest(
                [Violation("subject", f"{subject[:40]!r} is no subject of a default of kind {kind[:10]}")]
            )
        default = Default(kind, subject, parse_steering(steering))
        where = (table.c.kind == kind, table.c.subject == subject)
        with self._database.change(actor) as change:
            document = default.document["steering"]
            change.connection.execute(table.delete().where(*where))
            change.connection.execute(table.insert().values(kind=kind, subject=subject, document=json.dumps(document)))
            change.record("default.set", f"{kind}:{subject}", {"steering": document, "reason": reason})
        return default

    def remove(self, kind: Kind, subject: str, *, actor: str, reason: str = "") -> None:
        """Takes a default away.

        Raises:
            NotFound: there is none.
        """
        with self._database.change(actor) as change:
            where = (table.c.kind == kind, table.c.subject == subject)
            # PostgreSQL takes no NUL in a text, not even to look for it.
            if "\0" in kind + subject or not change.connection.execute(table.delete().where(*where)).rowcount:
                raise NotFound(f"there is no default of kind {kind[:10]!r} for {subject[:40]!r}", field="subject")
            change.record("default.remove", f"{kind}:{subject}", {"reason": reason})

    def list(self) -> tuple[Default, ...]:
        """All of them."""
        with self._database.read() as connection:
            return tuple(defaults_of(connection).by_subject.values())


def defaults_of(connection: Connection) -> Defaults:
    """`DefaultSteering.list` within a state that is being read."""
    rows = connection.execute(sa.select(table).order_by(table.c.kind, table.c.subject)).mappings()
    found = [Default(row["kind"], row["subject"], parse_steering(json.loads(row["document"]))) for row in rows]
    return Defaults({(default.kind, default.subject): default for default in found})
