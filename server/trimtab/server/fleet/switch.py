"""The kill switch: all steering off, on every replica.

    off         requests are steered as they ask
    unsteered   every request that would be steered is answered unsteered, and says `killed`
    fallback    it is steered by the named safe default instead, and says `killed`; the proof names what was applied
    refuse      it is refused, 503 `steering_killed`

Requests that run when the switch is thrown end with an error (`end`), or finish as they began (`finish`).
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from trimtab.server.database.database import Database
from trimtab.server.database.schema import switch as table
from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.registry.version import Running
from trimtab.server.steering import Steering, parse_steering

__all__ = ["OFF", "KillSwitch", "Mode", "Switch", "switch_of"]

Mode = Literal["off", "unsteered", "fallback", "refuse"]
_NAME = "steering"
MAX_REASON = 1000


@dataclass(frozen=True)
class Switch:
    """How the switch stands."""

    mode: Mode
    fallback: Steering | None
    """The safe default of `fallback`."""
    running: Running
    """What became of the requests that ran when it was thrown."""
    reason: str
    actor: str
    at: str

    @property
    def document(self) -> dict[str, Any]:
        """As it is shown."""
        fallback = None if self.fallback is None else self.fallback.model_dump(mode="json", exclude_unset=True)
        return {**vars(self), "fallback": fallback}


OFF = Switch("off", None, "finish", "", "", "")


class KillSwitch:
    """The switch in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def throw(self, mode: Mode, *, actor: str, reason: str, running: Running = "end", fallback: Any = None) -> Switch:
        """The switch, thrown; `off` lets steering go on. `fallback` is a `steering` field.

        Raises:
            InvalidRequest: no reason, or a fallback without its mode or the mode without it.
            InvalidSteering: the fallback is no valid `steering` field.
        """
        if not reason.strip() or len(reason) > MAX_REASON or "\0" in reason:
            raise InvalidRequest(
                [Violation("reason", f"must be 1 to {MAX_REASON} characters; it goes to callers and to the log")]
            )
        if (mode == "fallback") != (fallback is not None):
            raise InvalidRequest([Violation("fallback", "goes with mode `fallback`, which needs it")])
        safe = None if fallback is None else parse_steering(fallback)
        with self._database.change(actor) as change:
            switch = Switch(mode, safe, running, reason, change.actor, change.at)
            document = switch.document
            text = None if document["fallback"] is None else json.dumps(document["fallback"])
            change.connection.execute(table.delete())
            change.connection.execute(table.insert().values(**{**document, "fallback": text, "name": _NAME}))
            detail = {"mode": mode, "fallback": document["fallback"], "running": running, "reason": reason}
            change.record("switch.kill" if mode != "off" else "switch.resume", _NAME, detail)
        return switch

    def read(self) -> Switch:
        """How it stands."""
        with self._database.read() as connection:
            return switch_of(connection)


def switch_of(connection: Connection) -> Switch:
    """`KillSwitch.read` within a state that is being read."""
    row = connection.execute(sa.select(table).where(table.c.name == _NAME)).mappings().first()
    if row is None:
        return OFF
    values = {key: value for key, value in row.items() if key != "name"}
    fallback = None if row["fallback"] is None else parse_steering(json.loads(row["fallback"]))
    return Switch(**{**values, "fallback": fallback})
