"""Outcomes: what became of a reply, or of a unit; told by the application at any later time, as often as it likes.

    {"response_id": "chatcmpl-…", "name": "harm", "value": 1}                      of a reply
    {"unit": {"user": "u-17"}, "name": "harm_before", "value": 0.2, "at": "…"}     of a unit: a covariate, or what is no reply's

An outcome is its subject, its name and its `event` (empty if there is but one): telling it again changes nothing, telling
another value of it is a conflict, and nothing of that batch is kept. Several events of one name are summed per unit. An outcome
whose reply is not known (yet) is kept as `pending`, and counts as soon as the exposure arrives; after PENDING_DAYS it goes.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trimtab.server.database.database import Database, Moment, text_of, utc_now
from trimtab.server.database.schema import exposure
from trimtab.server.database.schema import outcome as table
from trimtab.server.errors import Conflict, InvalidRequest, Violation
from trimtab.server.experiments.assignment import MAX_UNIT
from trimtab.server.experiments.exposures import insert_new

__all__ = ["MAX_OUTCOMES", "PENDING_DAYS", "Given", "Outcome", "Outcomes", "bare_id", "parse_outcomes", "unit_digest"]

MAX_OUTCOMES = 1000
"""Of one call."""
PENDING_DAYS = 7
_PREFIXES = ("chatcmpl-", "cmpl-", "resp_")
_ID = re.compile(r"[0-9a-f]{32}")
_FAR = timedelta(days=1)
"""How far ahead of this server's clock a caller's may be."""


class Given(BaseModel):
    """An outcome, as it is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    response_id: Annotated[str, Field(max_length=64)] | None = None
    unit: (
        dict[Literal["user", "conversation", "tenant"], Annotated[str, Field(min_length=1, max_length=MAX_UNIT)]] | None
    ) = None
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    value: Annotated[float, Field(allow_inf_nan=False, strict=False)]
    event: Annotated[str, Field(max_length=64, pattern=r"^[\x21-\x7e]*$")] = ""
    at: Moment | None = None


_GIVEN = TypeAdapter(Annotated[tuple[Given, ...], Field(min_length=1, max_length=MAX_OUTCOMES)])


class Outcome(NamedTuple):
    """One outcome."""

    subject: str
    """The bare id of a reply, or the keyed hash of a unit."""
    name: str
    event: str
    value: float
    at: str

    @property
    def is_of_reply(self) -> bool:
        """And not of a unit."""
        return bool(_ID.fullmatch(self.subject))


def bare_id(response_id: str) -> str | None:
    """The id of a reply without OpenAI's prefix; None if no reply of this server has such an id."""
    for prefix in _PREFIXES:
        response_id = response_id.removeprefix(prefix)
    return response_id if _ID.fullmatch(response_id) else None


def unit_digest(digest: Callable[[str], str], kind: str, unit: str) -> str:
    """The keyed hash that stands for a unit wherever something is stored."""
    return digest(f"unit:{kind}:{unit}")


def parse_outcomes(given: Any, digest: Callable[[str], str], *, now: datetime) -> tuple[Outcome, ...]:
    """The outcomes of a call; `digest` is keyed.

    Raises:
        InvalidRequest: with every violation at once.
    """
    try:
        parsed = _GIVEN.validate_python(given)
    except ValidationError as e:
        raise InvalidRequest(
            [
                Violation(_path(error["loc"]), error["msg"])
                for error in e.errors(include_url=False, include_input=False, include_context=False)[:20]
            ]
        ) from e
    violations: list[Violation] = []
    outcomes: list[Outcome] = []
    for i, one in enumerate(parsed):
        where = f"outcomes[{i}]"
        subject: str | None = None
        if (one.response_id is None) == (one.unit is None):
            violations.append(Violation(where, "give exactly one of `response_id` and `unit`"))
        elif one.response_id is not None:
            subject = bare_id(one.response_id)
            if subject is None:
                violations.append(
                    Violation(f"{where}.response_id", f"{one.response_id[:40]!r} is no id of a reply of this server")
                )
        elif one.unit is not None:
            if len(one.unit) != 1 or not all(unit.isprintable() for unit in one.unit.values()):
                violations.append(Violation(f"{where}.unit", 'is one kind and its printable id: {"user": "u-17"}'))
            else:
                ((kind, unit),) = one.unit.items()
                subject = unit_digest(digest, kind, unit)
        if one.at is not None and one.at > now + _FAR:
            violations.append(Violation(f"{where}.at", f"is more than a day after this server's {text_of(now)}"))
        if subject is not None:
            outcomes.append(Outcome(subject, one.name, one.event, one.value, text_of(one.at or now)))
    if violations:
        raise InvalidRequest(violations[:20])
    return tuple(outcomes)


def _path(loc: tuple[int | str, ...]) -> str:
    return "outcomes" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)


class Outcomes:
    """The outcomes of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, outcomes: tuple[Outcome, ...], *, now: datetime | None = None) -> dict[str, int]:
        """How many were `recorded`, were there already (`duplicate`), and, of all of them, wait for their reply (`pending`).

        Raises:
            Conflict: an outcome is known with another value; nothing was written.
        """
        received = text_of(now or utc_now())
        unique: dict[tuple[str, str, str], Outcome] = {}
        for i, one in enumerate(outcomes):
            first = unique.setdefault(one[:3], one)
            if first.value != one.value:
                raise _conflict(i, one, first.value)
        with self._database.append() as connection:
            known = _known(connection, outcomes)
            new = [one._asdict() | {"received_at": received} for key, one in unique.items() if key not in known]
            if new:
                insert_new(connection, table, new)
                known = _known(connection, outcomes)  # Somebody else may have told some of them meanwhile.
            for i, one in enumerate(outcomes):
                if known[one[:3]] != one.value:
                    raise _conflict(i, one, known[one[:3]])
            replies = {one.subject for one in outcomes if one.is_of_reply}
            found = connection.execute(sa.select(exposure.c.response_id).where(exposure.c.response_id.in_(replies)))
            there = {row.response_id for row in found}
        pending = sum(one.is_of_reply and one.subject not in there for one in outcomes)
        return {"recorded": len(new), "duplicate": len(outcomes) - len(new), "pending": pending}

    def forget_pending(self, *, now: datetime | None = None) -> int:
        """How many were of replies that nobody has heard of for too long, and are gone."""
        before = text_of((now or utc_now()) - timedelta(days=PENDING_DAYS))
        of_reply = sa.func.length(table.c.subject) == 32
        known = sa.exists().where(exposure.c.response_id == table.c.subject)
        with self._database.append() as connection:
            return connection.execute(table.delete().where(table.c.received_at < before, of_reply, ~known)).rowcount


def _known(connection: sa.Connection, outcomes: tuple[Outcome, ...]) -> Mapping[tuple[str, str, str], float]:
    query = sa.select(table.c.subject, table.c.name, table.c.event, table.c.value)
    rows = connection.execute(query.where(table.c.subject.in_({one.subject for one in outcomes})))
    return {(row.subject, row.name, row.event): row.value for row in rows}


def _conflict(i: int, one: Outcome, value: float) -> Conflict:
    event = f" (event {one.event!r})" if one.event else ""
    return Conflict(
        f"outcomes[{i}]: {one.name!r}{event} of this subject is {value:g} already, not {one.value:g}; nothing of this call "
        "was kept; give another `event` for another occurrence",
        field=f"outcomes[{i}].value",
    )
