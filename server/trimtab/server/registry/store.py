"""The registry in the database: upload, promote, revoke, set the default; each change with its audit entry.

The bytes lie in the database under their own digest: every replica that sees the database sees them, and no path is ever chosen
by a client. All functions block; on an event loop use `asyncio.to_thread`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from trimtab.attribution.bundle import Bundle, BundleError
from trimtab.server.database.database import Database
from trimtab.server.database.schema import blob
from trimtab.server.database.schema import bundle_version as table
from trimtab.server.errors import Conflict, InvalidBundle, InvalidRequest, Tampered, UnknownBundle, Violation
from trimtab.server.registry.signature import Signatures
from trimtab.server.registry.version import Running, State, Version, require_active, require_promotable

__all__ = ["MAX_BUNDLE_BYTES", "Registry", "digest_of", "versions"]

MAX_BUNDLE_BYTES = 64 << 20
"""Of one bundle's file; a hundred latents of a model as wide as 8,192 are 7 MB."""
MAX_REASON = 1000


class Registry:
    """The versions of bundles in one database."""

    def __init__(self, database: Database, signatures: Signatures | None = None) -> None:
        self._database = database
        self._signatures = signatures or Signatures()

    def upload(
        self, data: bytes, *, actor: str, signature: str | None = None, reason: str = ""
    ) -> tuple[Version, bool]:
        """The version of these bytes, a draft, and whether it is new: the same bytes are the same version.

        Raises:
            InvalidBundle: the bytes are no bundle, too many, or not signed as this server asks.
            Conflict: they are of a version that was revoked.
        """
        _check_reason(reason)
        if len(data) > MAX_BUNDLE_BYTES:
            raise InvalidBundle(f"the bundle is {len(data)} bytes; a registry takes {MAX_BUNDLE_BYTES}", field="body")
        try:
            bundle = Bundle.from_bytes(data)
        except BundleError as e:
            raise InvalidBundle(str(e), field="body") from e
        header = bundle.header
        self._signatures.check(f"bundle {header.name!r}", data, signature)
        digest = digest_of(data)
        with self._database.change(actor) as change:
            known = _one(change.connection, table.c.content_hash == bundle.content_hash)
            if known is not None:
                if known.state == "revoked":
                    raise Conflict(
                        f"these are the bytes of {known.reference}, which was revoked ({known.reason})", field="body"
                    )
                return known, False
            same_name = sa.select(sa.func.coalesce(sa.func.max(table.c.number), 0)).where(table.c.name == header.name)
            version = Version(
                name=header.name,
                number=change.connection.execute(same_name).scalar_one() + 1,
                state="draft",
                is_default=False,
                content_hash=bundle.content_hash,
                file_digest=digest,
                n_bytes=len(data),
                model=header.model.id,
                fingerprint=header.model.fingerprint,
                hook_point=header.hook_point,
                behaviour=header.behaviour,
                signature=signature,
                created_at=change.at,
                created_by=change.actor,
                changed_at=change.at,
                reason=reason,
                running=None,
            )
            if change.connection.execute(sa.select(blob.c.digest).where(blob.c.digest == digest)).first() is None:
                change.connection.execute(blob.insert().values(digest=digest, data=data))
            change.connection.execute(table.insert().values(**vars(version)))
            detail = {"content_hash": bundle.content_hash, "file_digest": digest, "signed": signature is not None}
            change.record("bundle.upload", version.reference, detail | {"reason": reason})
        return version, True

    def promote(self, name: str, number: int, *, actor: str, reason: str = "", default: bool = False) -> Version:
        """The version, active from now on, and the default of its name if asked.

        Raises:
            UnknownBundle: there is no such version.
            Conflict: it is revoked.
            InvalidBundle: its bytes are not signed as this server asks.
        """
        _check_reason(reason)
        with self._database.change(actor) as change:
            version = _find(change.connection, name, number)
            require_promotable(version)
            if version.state != "active":
                self._signatures.check(version.reference, _data(change.connection, version), version.signature)
                _update(change.connection, version, state="active", changed_at=change.at, reason=reason)
                change.record("bundle.promote", version.reference, {"reason": reason, "from": version.state})
            if default and not version.is_default:
                _set_default(change.connection, version)
                change.record("bundle.set_default", version.reference, {"reason": reason})
            return _find(change.connection, name, number)

    def set_default(self, name: str, number: int, *, actor: str, reason: str = "") -> Version:
        """The version that `name` alone means from now on.

        Raises:
            UnknownBundle: there is no such version.
            Conflict: it is not active.
        """
        _check_reason(reason)
        with self._database.change(actor) as change:
            version = _find(change.connection, name, number)
            require_active(version)
            if not version.is_default:
                _set_default(change.connection, version)
                change.record("bundle.set_default", version.reference, {"reason": reason})
            return _find(change.connection, name, number)

    def revoke(self, name: str, number: int, *, actor: str, reason: str, running: Running = "end") -> Version:
        """The version, revoked for good; a name whose default it was has none until another is set.

        Raises:
            UnknownBundle: there is no such version.
            InvalidRequest: no reason is given.
        """
        _check_reason(reason)
        if not reason.strip():
            raise InvalidRequest(
                [Violation("reason", "is empty; a revocation needs one, for the audit log and for callers")]
            )
        with self._database.change(actor) as change:
            version = _find(change.connection, name, number)
            if version.state != "revoked":
                _update(
                    change.connection,
                    version,
                    state="revoked",
                    is_default=False,
                    changed_at=change.at,
                    reason=reason,
                    running=running,
                )
                detail = {
                    "reason": reason,
                    "from": version.state,
                    "running": running,
                    "was_default": version.is_default,
                }
                change.record("bundle.revoke", version.reference, detail)
            return _find(change.connection, name, number)

    def list(self, *, name: str | None = None, state: State | None = None) -> tuple[Version, ...]:
        """The versions, by name and number."""
        with self._database.read() as connection:
            return versions(connection, name=name, state=state)

    def find(self, name: str, number: int) -> Version:
        """One version.

        Raises:
            UnknownBundle: there is none.
        """
        with self._database.read() as connection:
            return _find(connection, name, number)

    def data(self, version: Version) -> bytes:
        """The bytes of a version's file.

        Raises:
            Tampered: they are not those that were uploaded.
        """
        with self._database.read() as connection:
            return _data(connection, version)

    def bundle(self, version: Version) -> Bundle:
        """The version's bundle, with its bytes and its signature checked anew.

        Raises:
            Tampered: the bytes are not those that were uploaded.
            InvalidBundle: they are not signed as this server asks.
        """
        data = self.data(version)
        self._signatures.check(version.reference, data, version.signature)
        bundle = Bundle.from_bytes(data)
        if (bundle.header.name, bundle.content_hash) != (version.name, version.content_hash):
            raise Tampered(
                f"the registry says {version.reference} is {version.content_hash}; its bytes are {bundle.content_hash}"
            )
        return bundle


def digest_of(data: bytes) -> str:
    """`sha256:…` of a file's bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def versions(connection: Connection, *, name: str | None = None, state: State | None = None) -> tuple[Version, ...]:
    """`Registry.list` within a state that is being read."""
    query = sa.select(table).order_by(table.c.name, table.c.number)
    if name is not None:
        query = query.where(table.c.name == name)
    if state is not None:
        query = query.where(table.c.state == state)
    return tuple(Version(**row) for row in connection.execute(query).mappings())


def _check_reason(reason: str) -> None:
    if len(reason) > MAX_REASON or "\0" in reason:
        raise InvalidRequest([Violation("reason", f"is at most {MAX_REASON} characters, without NUL")])


def _one(connection: Connection, *where: sa.ColumnElement[bool]) -> Version | None:
    row = connection.execute(sa.select(table).where(*where)).mappings().first()
    return None if row is None else Version(**row)


def _find(connection: Connection, name: str, number: int) -> Version:
    version = _one(connection, table.c.name == name, table.c.number == number)
    if version is None:
        others: Sequence[int] = (
            connection.execute(sa.select(table.c.number).where(table.c.name == name).order_by(table.c.number))
            .scalars()
            .all()
        )
        held = f"it holds {', '.join(f'v{n}' for n in others)} of {name}" if others else "it holds none of that name"
        raise UnknownBundle(f"{name}:v{number} is not in the registry; {held}", field="version")
    return version


def _data(connection: Connection, version: Version) -> bytes:
    data = connection.execute(sa.select(blob.c.data).where(blob.c.digest == version.file_digest)).scalar_one_or_none()
    if data is None or digest_of(bytes(data)) != version.file_digest:
        raise Tampered(
            f"the stored bytes of {version.reference} are not those that were uploaded; revoke it, and upload it anew"
        )
    return bytes(data)


def _update(connection: Connection, version: Version, **values: Any) -> None:
    this = (table.c.name == version.name, table.c.number == version.number)
    connection.execute(table.update().where(*this).values(**values))


def _set_default(connection: Connection, version: Version) -> None:
    connection.execute(table.update().where(table.c.name == version.name).values(is_default=False))
    _update(connection, version, is_default=True)
