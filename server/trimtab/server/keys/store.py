"""Keys in the database: made, rotated, revoked; each change with its audit entry. All functions block."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from trimtab.server.database.database import Database, text_of
from trimtab.server.database.schema import api_key as table
from trimtab.server.errors import Conflict, InvalidRequest, NotFound, Violation
from trimtab.server.keys.key import Key, Policy, Scope, make
from trimtab.server.keys.secret import Secret

__all__ = ["Keys", "keys_of"]

MAX_LABEL = 100


class Keys:
    """The keys of one database."""

    def __init__(self, database: Database, secret: Secret) -> None:
        self._database = database
        self._secret = secret

    def create(
        self,
        *,
        label: str,
        scopes: frozenset[Scope],
        actor: str,
        policy: Policy | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[Key, str]:
        """A new key as it is kept, and the key itself: this is the only time that it can be had.

        Raises:
            InvalidRequest: no scopes, or a label that is too long.
        """
        if not scopes:
            raise InvalidRequest([Violation("scopes", "are empty: the key would open nothing")])
        if not label.strip() or len(label) > MAX_LABEL or not label.isprintable():
            raise InvalidRequest(
                [Violation("label", f"must be 1 to {MAX_LABEL} printable characters, what the key is for")]
            )
        with self._database.change(actor) as change:
            text, public = make()
            key = Key(
                id=public,
                label=label,
                digest=self._secret.digest(text),
                scopes=scopes,
                policy=policy or Policy(),
                created_at=change.at,
                created_by=change.actor,
                expires_at=None if expires_at is None else text_of(expires_at),
                revoked_at=None,
                rotated_from=None,
            )
            _insert(change.connection, key)
            change.record("key.create", key.id, _told(key))
        return key, text

    def rotate(self, key_id: str, *, actor: str, grace_seconds: int = 0) -> tuple[Key, str]:
        """A new key that allows what an old one does, and the key itself; the old one goes on for the grace.

        Raises:
            NotFound: there is no such key.
            Conflict: it is not valid any more.
        """
        if not 0 <= grace_seconds <= 90 * 86400:
            raise InvalidRequest(
                [Violation("grace_seconds", f"must be 0 … {90 * 86400} (90 days), not {grace_seconds}")]
            )
        with self._database.change(actor) as change:
            old = _find(change.connection, key_id)
            if not old.is_valid(change.at):
                raise Conflict(f"key {key_id} is not valid any more; create a new one", field="id")
            text, public = make()
            new = replace(
                old,
                id=public,
                digest=self._secret.digest(text),
                created_at=change.at,
                created_by=change.actor,
                rotated_from=old.id,
            )
            _insert(change.connection, new)
            end = text_of(datetime.fromisoformat(change.at).astimezone(UTC) + timedelta(seconds=grace_seconds))
            end = end if old.expires_at is None else min(end, old.expires_at)
            change.connection.execute(table.update().where(table.c.id == old.id).values(expires_at=end))
            change.record("key.rotate", old.id, {"to": new.id, "old_expires_at": end})
        return new, text

    def revoke(self, key_id: str, *, actor: str, reason: str = "") -> Key:
        """The key, which opens nothing from now on.

        Raises:
            NotFound: there is no such key.
        """
        if len(reason) > 1000 or "\0" in reason:
            raise InvalidRequest([Violation("reason", "is at most 1000 characters, without NUL")])
        with self._database.change(actor) as change:
            key = _find(change.connection, key_id)
            if key.revoked_at is None:
                change.connection.execute(table.update().where(table.c.id == key_id).values(revoked_at=change.at))
                change.record("key.revoke", key_id, {"reason": reason})
            return _find(change.connection, key_id)

    def list(self) -> tuple[Key, ...]:
        """All keys, by the time they were made."""
        with self._database.read() as connection:
            return keys_of(connection)


def keys_of(connection: Connection) -> tuple[Key, ...]:
    """`Keys.list` within a state that is being read."""
    rows = connection.execute(sa.select(table).order_by(table.c.created_at, table.c.id)).mappings()
    return tuple(_key(row) for row in rows)


def _find(connection: Connection, key_id: str) -> Key:
    # PostgreSQL takes no NUL in a text, not even to look for it.
    query = sa.select(table).where(table.c.id == key_id)
    row = None if "\0" in key_id else connection.execute(query).mappings().first()
    if row is None:
        raise NotFound(f"there is no key {key_id[:20]!r}; `trimtab keys list` lists them", field="id")
    return _key(row)


def _key(row: RowMapping) -> Key:
    scopes = frozenset(json.loads(row["scopes"]))
    return Key(**{**row, "scopes": scopes, "policy": Policy.model_validate_json(row["policy"])})


def _insert(connection: Connection, key: Key) -> None:
    stored = {**vars(key), "scopes": json.dumps(sorted(key.scopes)), "policy": key.policy.model_dump_json()}
    connection.execute(table.insert().values(**stored))


def _told(key: Key) -> dict[str, object]:
    policy = key.policy.model_dump(mode="json", exclude_defaults=True)
    return {"label": key.label, "scopes": sorted(key.scopes), "policy": policy, "expires_at": key.expires_at}
