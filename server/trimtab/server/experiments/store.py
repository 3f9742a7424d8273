"""Experiments in the database: written down, edited, moved through their life; every change audited. All functions block."""

import json
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from trimtab.server.database.database import Change, Database, text_of
from trimtab.server.database.schema import experiment as table
from trimtab.server.database.schema import experiment_entry as entries
from trimtab.server.database.schema import exposure
from trimtab.server.database.schema import holdout as holdouts
from trimtab.server.errors import Conflict, InvalidRequest, Violation
from trimtab.server.experiments import lifecycle
from trimtab.server.experiments.definition import Experiment, parse_experiment
from trimtab.server.experiments.errors import ExperimentState, UnknownExperiment
from trimtab.server.experiments.lifecycle import Action, Entry, Record, State, draft
from trimtab.server.experiments.texts import delete_texts

__all__ = ["ACTOR", "Experiments", "holdout_of", "records_of"]

ACTOR = "server"
"""Who makes the changes that the server makes by itself."""

MAX_REASON = 1000
_HOLDOUT = "global"


class Experiments:
    """The experiments of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, definition: Any, *, actor: str, reason: str) -> Record:
        """A new experiment, a draft.

        Raises:
            InvalidExperiment: the definition breaks a rule.
            Conflict: its key is taken, for good: one that is archived keeps it.
        """
        parsed = parse_experiment(definition)
        _check_reason(reason)
        with self._database.change(actor) as change:
            if _one(change.connection, parsed.key) is not None:
                raise Conflict(f"there is an experiment {parsed.key!r} already; edit it, or take another key")
            record, entry = draft(parsed, actor=change.actor, reason=reason, at=datetime.fromisoformat(change.at))
            change.connection.execute(table.insert().values(**_stored(record)))
            _recorded(change, entry, {"definition": _document(parsed)})
        return record

    def edit(self, key: str, definition: Any, *, actor: str, reason: str, revision: int | None = None) -> Record:
        """The experiment with another definition, while it is a draft.

        Raises:
            InvalidExperiment: the definition breaks a rule.
            UnknownExperiment, ExperimentState, StaleRevision: it is not there, has started, or has changed meanwhile.
        """
        parsed = parse_experiment(definition)
        return self.change(key, "edit", actor=actor, reason=reason, revision=revision, definition=parsed)

    def change(self, key: str, action: Action, *, actor: str, reason: str, **options: Any) -> Record:
        """The experiment after an action of `lifecycle.change`, which takes the options.

        Raises:
            UnknownExperiment: there is none of that key.
            ExperimentState: its state does not allow the action.
            StaleRevision: it is not at the revision that was given.
        """
        _check_reason(reason)
        with self._database.change(actor) as change:
            before = _found(change.connection, key)
            at = datetime.fromisoformat(change.at)
            record, entry = lifecycle.change(before, action, actor=change.actor, reason=reason, at=at, **options)
            change.connection.execute(table.update().where(table.c.key == key).values(**_stored(record)))
            detail: dict[str, Any] = {}
            if action == "edit":
                detail = {"definition": _document(record.definition)}
            elif action == "start":
                detail = {"plans": dict(record.plans)}
            elif action == "approve":
                detail = {"step": record.approved}
            elif action == "archive" and record.definition.text is not None:
                detail = {"texts_deleted": delete_texts(change.connection, key)}
            elif action == "purge":
                count = sa.select(sa.func.count()).where(exposure.c.experiment == key)
                detail = {"exposures": change.connection.execute(count).scalar_one()}
            _recorded(change, entry, detail)
        return record

    def list(self, *, state: State | None = None) -> tuple[Record, ...]:
        """All of them, or those of a state, by key."""
        with self._database.read() as connection:
            return records_of(connection, *(() if state is None else (state,)))

    def find(self, key: str) -> Record:
        """One of them.

        Raises:
            UnknownExperiment: there is none of that key.
        """
        with self._database.read() as connection:
            return _found(connection, key)

    def measured(self, key: str) -> Record:
        """One of them, of which what it measured is there.

        Raises:
            UnknownExperiment: there is none of that key.
            ExperimentState: it was purged.
        """
        record = self.find(key)
        if record.state == "purged":
            raise ExperimentState(
                f"experiment {key!r} was purged on {text_of(record.changed_at)}: what it measured was deleted; its definition "
                f"and history are at /admin/v1/experiments/{key}"
            )
        return record

    def history(self, key: str) -> tuple[dict[str, Any], ...]:
        """Every change of it, oldest first."""
        query = sa.select(entries).where(entries.c.experiment == key).order_by(entries.c.revision)
        with self._database.read() as connection:
            return tuple(
                {name: value for name, value in row.items() if name != "experiment"}
                for row in connection.execute(query).mappings()
            )

    def hold_out(self, share: float, *, actor: str, reason: str) -> float:
        """The share of all units that no experiment takes in from now on, but those that do not respect it.

        Raises:
            InvalidRequest: it is no share.
        """
        _check_reason(reason)
        if not 0 <= share < 1:
            raise InvalidRequest([Violation("share", f"is a share, 0 … 1 without 1, not {share}")])
        with self._database.change(actor) as change:
            before = holdout_of(change.connection)
            change.connection.execute(holdouts.delete())
            change.connection.execute(holdouts.insert().values(name=_HOLDOUT, share=share))
            change.record("experiment.holdout", _HOLDOUT, {"before": before, "share": share, "reason": reason})
        return share


def records_of(connection: Connection, *states: State) -> tuple[Record, ...]:
    """Experiments in these states, or in any, within a state of the database that is being read."""
    query = sa.select(table).order_by(table.c.key)
    if states:
        query = query.where(table.c.state.in_(states))
    return tuple(_record(row) for row in connection.execute(query).mappings())


def holdout_of(connection: Connection) -> float:
    """The share that is held out, likewise."""
    share = connection.execute(sa.select(holdouts.c.share).where(holdouts.c.name == _HOLDOUT)).scalar_one_or_none()
    return float(share or 0.0)


def _check_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > MAX_REASON or "\0" in reason:
        raise InvalidRequest(
            [Violation("reason", f"must be 1 to {MAX_REASON} characters, without NUL; it goes to the audit log")]
        )


def _one(connection: Connection, key: str) -> Record | None:
    row = connection.execute(sa.select(table).where(table.c.key == key)).mappings().first()
    return None if row is None else _record(row)


def _found(connection: Connection, key: str) -> Record:
    record = None if "\0" in key else _one(connection, key)
    if record is None:
        raise UnknownExperiment(f"there is no experiment {key[:63]!r}; GET /admin/v1/experiments lists them")
    return record


def _record(row: RowMapping) -> Record:
    def time(name: str) -> datetime:
        return datetime.fromisoformat(row[name])

    return Record(
        definition=parse_experiment(json.loads(row["definition"])),
        state=row["state"],
        coverage=row["coverage"],
        revision=row["revision"],
        changed_at=time("changed_at"),
        covered_since=time("covered_since"),
        started_at=None if row["started_at"] is None else time("started_at"),
        step=row["step"],
        approved=row["approved"],
        plans=json.loads(row["plans"]),
        ends_running=row["ends_running"],
    )


def _stored(record: Record) -> dict[str, Any]:
    return {
        "key": record.definition.key,
        "definition": json.dumps(_document(record.definition)),
        "state": record.state,
        "coverage": record.coverage,
        "revision": record.revision,
        "changed_at": text_of(record.changed_at),
        "covered_since": text_of(record.covered_since),
        "started_at": None if record.started_at is None else text_of(record.started_at),
        "step": record.step,
        "approved": record.approved,
        "plans": json.dumps(dict(record.plans)),
        "ends_running": record.ends_running,
    }


def _document(definition: Experiment) -> dict[str, Any]:
    return definition.model_dump(mode="json", exclude_unset=True)


def _recorded(change: Change, entry: Entry, detail: dict[str, Any]) -> None:
    """The entry, in the experiment's own trail and in the audit log."""
    state, coverage = entry.after
    change.connection.execute(
        entries.insert().values(
            experiment=entry.experiment,
            revision=entry.revision,
            action=entry.action,
            actor=entry.actor,
            reason=entry.reason,
            at=text_of(entry.at),
            state=state,
            coverage=coverage,
        )
    )
    told = {"revision": entry.revision, "reason": entry.reason, "state": state, "coverage": coverage}
    change.record(f"experiment.{entry.action}", entry.experiment, told | detail)
