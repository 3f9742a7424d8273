"""Opening the database; reading one state of it; changing it, one writer at a time, with an audit entry for every change.

    with database.read() as connection: …                         one consistent state, whatever is written meanwhile
    with database.change("key:ab12cd34") as change:                all or nothing
        change.connection.execute(…)
        change.record("bundle.promote", "calm:v3", {"reason": …})
    with database.append() as connection: …                        measurements, which are no change of the fleet: no entry

The number of the last audit entry is the version of the whole database: `sequence()` tells a replica cheaply whether it has to
look again. Calls block; on an event loop use `asyncio.to_thread`.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import AfterValidator, AwareDatetime
from pydantic_core import PydanticCustomError
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from trimtab.server.database import audit
from trimtab.server.database.schema import audit as audit_table
from trimtab.server.errors import Unavailable, Unsupported

__all__ = ["Change", "Database", "Moment", "text_of", "utc_now"]

_WRITE = "trimtab_write"
_LOCK = 0x7472_696D_7461_62
"""PostgreSQL's advisory lock of whoever writes."""
BUSY_SECONDS = 10
CONNECT_SECONDS = 5


def utc_now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def text_of(at: datetime) -> str:
    """A time as the tables hold it."""
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _in_utc(at: datetime) -> datetime:
    try:
        return at.astimezone(UTC)
    except OverflowError as e:
        raise PydanticCustomError("out_of_range", "is before the year 1 or after the year 9999 in UTC") from e


Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A time that a caller gives, with its offset."""


class Change:
    """A write transaction; every change in it is recorded, or none of it is."""

    def __init__(self, connection: Connection, actor: str, now: str) -> None:
        self.connection = connection
        self.actor = actor[:128]
        last = connection.execute(sa.select(audit_table).order_by(audit_table.c.sequence.desc()).limit(1)).first()
        self._sequence: int = 0 if last is None else last.sequence
        self._previous: str = audit.BEGINNING if last is None else last.digest
        self.at = now if last is None else max(now, last.at)
        """The time of this change; never before the last one's, whatever the clock says."""
        self.entries: list[audit.Entry] = []

    def record(self, action: str, subject: str, detail: dict[str, Any]) -> audit.Entry:
        """The audit entry of one change."""
        entry = audit.link(self._sequence + 1, self.at, self.actor, action, subject[:256], detail, self._previous)
        self.connection.execute(audit_table.insert().values(entry._replace(detail={})._asdict() | _stored(entry)))
        self._sequence, self._previous = entry.sequence, entry.digest
        self.entries.append(entry)
        return entry


def _stored(entry: audit.Entry) -> dict[str, str]:
    return {"detail": audit.canonical(entry.detail)}


class Database:
    """One database, by URL; connects when it is first used."""

    def __init__(self, url: str, *, clock: Callable[[], datetime] = utc_now) -> None:
        """Of `sqlite:///FILE` or `postgresql://USER@HOST/NAME`.

        Raises:
            Unsupported: the URL is neither, or its driver is not installed.
        """
        self._clock = clock
        try:
            parsed = make_url(url)
        except ArgumentError as e:
            raise Unsupported(f"database {url[:40]!r}: no URL; {_URLS}") from e
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {}
        if self.is_sqlite:
            if not parsed.database or parsed.database == ":memory:":
                raise Unsupported("a database in memory is lost with its process; give sqlite:///FILE")
            self.file: Path | None = Path(parsed.database).expanduser()
            parsed = parsed.set(database=str(self.file))
            options["connect_args"] = {"timeout": BUSY_SECONDS}
        elif parsed.get_backend_name() == "postgresql":
            self.file = None
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            options["connect_args"] = {"connect_timeout": CONNECT_SECONDS, "options": "-c statement_timeout=20000"}
        else:
            raise Unsupported(f"database {parsed.get_backend_name()!r} is not supported; {_URLS}")
        try:
            self.engine = sa.create_engine(parsed, pool_pre_ping=True, pool_timeout=BUSY_SECONDS, **options)
        except (ImportError, NoSuchModuleError) as e:
            raise Unsupported(f"{parsed.drivername} is not installed: pip install 'trimtab[postgresql]'") from e
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _on_sqlite_connect)
            sa.event.listen(self.engine, "begin", _on_sqlite_begin)

    def __repr__(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    def migrate(self) -> None:
        """Makes the tables, or brings them up to this release.

        Raises:
            Unavailable: the database cannot be reached or written.
            Unsupported: it is of a later release.
        """
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.touch(mode=0o600)
            except OSError as e:
                raise Unavailable(f"{self!r} cannot be written ({e.strerror}); give another with --database") from e
        with self._begin(write=True) as connection:
            self._known(connection)
            config = Config()
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def check(self) -> None:
        """Nothing, if the tables are those of this release.

        Raises:
            Unavailable: the database cannot be reached.
            Unsupported: the tables are those of another release.
        """
        with self.read() as connection:
            at = self._known(connection)
        if at != _head():
            raise Unsupported(
                f"{self!r} is at revision {at}, this release at {_head()}; run `trimtab registry migrate`"
            )

    def _known(self, connection: Connection) -> str | None:
        at = MigrationContext.configure(connection).get_current_revision()
        if at is not None and at not in {script.revision for script in _scripts().walk_revisions()}:
            raise Unsupported(f"{self!r} is at revision {at}, of a later release of Trimtab; install that one")
        return at

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state throughout.

        Raises:
            Unavailable: the database cannot be reached.
        """
        with self._begin(write=False) as connection:
            yield connection

    @contextmanager
    def change(self, actor: str) -> Iterator[Change]:
        """A change by `actor`; nobody else changes anything meanwhile, and an exception undoes it all.

        Raises:
            Unavailable: the database cannot be reached, or others wrote to it for too long.
        """
        with self._begin(write=True) as connection:
            yield Change(connection, actor, text_of(self._clock()))

    @contextmanager
    def append(self) -> Iterator[Connection]:
        """A connection that writes what nobody has to read anew after; PostgreSQL lets several do so at once.

        Raises:
            Unavailable: the database cannot be reached, or others wrote to it for too long.
        """
        with self._begin(write=True, alone=False) as connection:
            yield connection

    def sequence(self) -> int:
        """The number of the last change, 0 before the first."""
        with self.read() as connection:
            return int(
                connection.execute(sa.select(sa.func.coalesce(sa.func.max(audit_table.c.sequence), 0))).scalar_one()
            )

    def entries(self, *, after: int = 0, limit: int | None = None) -> list[audit.Entry]:
        """The audit entries after the first `after`."""
        query = sa.select(audit_table).where(audit_table.c.sequence > after).order_by(audit_table.c.sequence)
        with self.read() as connection:
            rows = connection.execute(query if limit is None else query.limit(limit)).mappings()
            return [audit.Entry(**{**row, "detail": json.loads(row["detail"])}) for row in rows]

    def close(self) -> None:
        """Closes its connections."""
        self.engine.dispose()

    @contextmanager
    def _begin(self, *, write: bool, alone: bool = True) -> Iterator[Connection]:
        options: dict[str, Any] = {_WRITE: write}
        if not self.is_sqlite and not write:
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        try:
            with self.engine.connect().execution_options(**options) as connection, connection.begin():
                if write and alone and not self.is_sqlite:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                yield connection
        except PoolTimeout as e:
            raise Unavailable(f"no connection to {self!r} was free for {BUSY_SECONDS} s; ask again later") from e
        except DBAPIError as e:
            raise Unavailable(f"{self!r} does not answer ({str(e.orig).strip()[:200]}); ask again once it does") from e


_URLS = "give sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/NAME"
_MIGRATIONS = Path(__file__).with_name("migrations")


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(os.fspath(_MIGRATIONS))


def _head() -> str | None:
    return _scripts().get_current_head()


def _on_sqlite_connect(connection: Any, _: Any) -> None:
    # The driver's own transactions begin too late to lock; SQLAlchemy begins them instead.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")
    # What is deleted is written over with zeros: sampled texts are kept for so many days, and no longer.
    connection.execute("PRAGMA secure_delete = ON")


def _on_sqlite_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
