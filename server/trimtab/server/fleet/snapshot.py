"""One state of all that a replica goes by, read in one transaction, and how a bundle's name is resolved in it."""

from dataclasses import dataclass
from functools import cached_property

import sqlalchemy as sa

from trimtab.server.database.database import Database
from trimtab.server.database.schema import audit
from trimtab.server.experiments.lifecycle import Record
from trimtab.server.experiments.store import holdout_of, records_of
from trimtab.server.fleet.defaults import Defaults, defaults_of
from trimtab.server.fleet.switch import OFF, Switch, switch_of
from trimtab.server.keys.key import Key
from trimtab.server.keys.store import keys_of
from trimtab.server.registry.store import versions
from trimtab.server.registry.version import Version

__all__ = ["EMPTY", "Snapshot", "read_snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """What the database said at one moment."""

    sequence: int
    """Of the last change in it; -1 before the first reading."""
    versions: tuple[Version, ...]
    keys: tuple[Key, ...]
    defaults: Defaults
    switch: Switch
    experiments: tuple[Record, ...] = ()
    """Those that have been started and are not archived, the first that was started first."""
    holdout: float = 0.0
    """The share of the units that no experiment takes in."""

    @cached_property
    def by_reference(self) -> dict[str, Version]:
        """Every version, by `calm:v3`."""
        return {version.reference: version for version in self.versions}

    @cached_property
    def default_of(self) -> dict[str, str]:
        """What a name alone means, `calm` → `calm:v3`."""
        return {version.name: version.reference for version in self.versions if version.is_default}

    @cached_property
    def revoked(self) -> dict[str, Version]:
        """Revoked versions, by content hash."""
        return {version.content_hash: version for version in self.versions if version.state == "revoked"}


EMPTY = Snapshot(-1, (), (), Defaults({}), OFF)


def read_snapshot(database: Database) -> Snapshot:
    """The newest state.

    Raises:
        Unavailable: the database does not answer.
    """
    with database.read() as connection:
        last = sa.select(sa.func.coalesce(sa.func.max(audit.c.sequence), 0))
        return Snapshot(
            sequence=connection.execute(last).scalar_one(),
            versions=versions(connection),
            keys=keys_of(connection),
            defaults=defaults_of(connection),
            switch=switch_of(connection),
            experiments=tuple(sorted(records_of(connection, "running", "paused", "stopped"), key=_order)),
            holdout=holdout_of(connection),
        )


def _order(record: Record) -> tuple[str, str]:
    return str(record.started_at), record.definition.key
