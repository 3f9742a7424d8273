"""The life of an experiment, draft → running ⇄ paused → stopped → archived, as pure functions; every change leaves an entry.

An archived experiment may be purged: what it measured is deleted, and its definition and trail stay (`retention`).

    action    from             to         may change
    edit      draft            draft      the definition
    start     draft            running    coverage := the first step of the ramp
    ramp      running, paused  same       coverage, upwards or downwards; no unit ever moves between arms (`assignment`)
    advance   running          running    coverage := the next step of the ramp schedule
    approve   running, paused  same       the next step of the schedule may be taken
    pause     running          paused
    resume    paused           running
    stop      running, paused  stopped    coverage := 0, with the reason it is over; requests that run finish as they began
    kill      running, paused  stopped    likewise, and requests that run end with an error
    rollback  running, paused  stopped    likewise, by the server itself; requests that run finish
    archive   draft, stopped   archived
    purge     archived         purged

A ramp by hand leaves the schedule; from then on every ramp is by hand.

The clock is the caller's; one that steps back is held at the latest time seen, so entries stay in order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from trimtab.server.experiments.definition import Experiment
from trimtab.server.experiments.errors import ExperimentState, StaleRevision

__all__ = ["Action", "Entry", "Record", "State", "change", "draft"]

State = Literal["draft", "running", "paused", "stopped", "archived", "purged"]
Action = Literal[
    "edit", "start", "ramp", "advance", "approve", "pause", "resume", "stop", "kill", "rollback", "archive", "purge"
]

_MOVES: dict[Action, dict[State, State]] = {
    "edit": {"draft": "draft"},
    "start": {"draft": "running"},
    "ramp": {"running": "running", "paused": "paused"},
    "advance": {"running": "running"},
    "approve": {"running": "running", "paused": "paused"},
    "pause": {"running": "paused"},
    "resume": {"paused": "running"},
    "stop": {"running": "stopped", "paused": "stopped"},
    "kill": {"running": "stopped", "paused": "stopped"},
    "rollback": {"running": "stopped", "paused": "stopped"},
    "archive": {"draft": "archived", "stopped": "archived"},
    "purge": {"archived": "purged"},
}


@dataclass(frozen=True)
class Record:
    """An experiment as it stands."""

    definition: Experiment
    state: State
    coverage: float
    """The share of the units that take part now; 0 … 1."""
    revision: int
    """Rises by one with every change."""
    changed_at: datetime
    covered_since: datetime
    """When the coverage last changed: a hold is counted from here."""
    started_at: datetime | None = None
    step: int | None = 0
    """Of the ramp schedule, the step that was taken last; None once a ramp by hand has left it."""
    approved: int = 0
    """The last step that a person has approved."""
    plans: Mapping[str, str] = field(default_factory=dict)
    """By arm, the hash of the plan that its steering compiled to when the experiment was started: another is refused."""
    ends_running: bool = False
    """Requests that ran when it was stopped end with an error."""


@dataclass(frozen=True)
class Entry:
    """One change in the audit trail."""

    experiment: str
    revision: int
    action: Literal["create"] | Action
    actor: str
    reason: str
    at: datetime
    before: tuple[State, float] | None
    """State and coverage."""
    after: tuple[State, float]


def draft(definition: Experiment, *, actor: str, reason: str, at: datetime) -> tuple[Record, Entry]:
    """A new experiment, and the first entry of its trail."""
    record = Record(definition, "draft", 0.0, 1, at, at)
    return record, Entry(definition.key, 1, "create", actor, reason, at, None, ("draft", 0.0))


def change(
    record: Record,
    action: Action,
    *,
    actor: str,
    reason: str,
    at: datetime,
    revision: int | None = None,
    coverage: float | None = None,
    definition: Experiment | None = None,
    plans: Mapping[str, str] | None = None,
) -> tuple[Record, Entry]:
    """The experiment after `action`, and the entry for it; `revision`, if given, must be the record's.

    `plans` goes with `start`.

    Raises:
        StaleRevision: it has changed since the caller read it.
        ExperimentState: the state does not allow the action, or the action comes without a reason or its value.
    """
    key = record.definition.key
    if revision is not None and revision != record.revision:
        raise StaleRevision(f"experiment {key!r} is at revision {record.revision}, not {revision}; read it again")
    if not reason.strip():
        raise ExperimentState(f"{action} of experiment {key!r} needs a reason", field="reason")
    if (state := _MOVES[action].get(record.state)) is None:
        allowed = ", ".join(name for name, moves in _MOVES.items() if record.state in moves) or "nothing"
        what = "immutable once started but for coverage; " if action == "edit" else ""
        raise ExperimentState(f"experiment {key!r} is {record.state}: {what}it allows {allowed}, not {action}")
    if (action == "ramp") != (coverage is not None):
        raise ExperimentState("coverage goes with ramp, and ramp needs it", field="coverage")
    if (action == "edit") != (definition is not None):
        raise ExperimentState("a definition goes with edit, and edit needs it", field="definition")
    if coverage is not None and not 0 <= coverage <= 1:
        raise ExperimentState(f"coverage is a share, 0 … 1, not {coverage}", field="coverage")
    if definition is not None and definition.key != key:
        raise ExperimentState(f"an experiment keeps its key, {key!r}; make another", field="definition.key")

    following = None if record.step is None else record.step + 1
    if action in ("advance", "approve") and (following is None or following >= len(record.definition.ramp)):
        why = "left by a ramp by hand" if following is None else "at its last step"
        raise ExperimentState(f"the ramp schedule of experiment {key!r} is {why}; ramp it to a coverage")

    at = max(at, record.changed_at)
    new = replace(record, state=state, revision=record.revision + 1, changed_at=at)
    match action:
        case "start":
            first = record.definition.ramp[0].coverage
            new = replace(new, coverage=first, covered_since=at, started_at=at, plans=dict(plans or {}))
        case "stop" | "rollback" | "kill":
            new = replace(new, coverage=0.0, covered_since=at, ends_running=action == "kill")
        case "ramp" if coverage is not None:
            new = replace(new, coverage=coverage, covered_since=at, step=None)
        case "advance" if following is not None:
            step = record.definition.ramp[following]
            new = replace(new, coverage=step.coverage, covered_since=at, step=following)
        case "approve" if following is not None:
            new = replace(new, approved=following)
        case "edit" if definition is not None:
            new = replace(new, definition=definition)
    entry = Entry(
        key, new.revision, action, actor, reason, at, (record.state, record.coverage), (new.state, new.coverage)
    )
    return new, entry
