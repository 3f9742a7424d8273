import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from trimtab.server.database.audit import verify
from trimtab.server.database.database import Database
from trimtab.server.database.schema import audit, metadata
from trimtab.server.errors import Tampered, Unavailable, Unsupported


def test_the_migrations_make_the_tables_that_are_written_down(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    database.migrate()
    database.check()


def test_a_database_of_a_later_release_is_refused(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'r9999'")
    with pytest.raises(Unsupported, match="later release"):
        database.check()
    with pytest.raises(Unsupported, match="later release"):
        database.migrate()


def test_a_database_without_tables_says_what_to_run(database_url: str) -> None:
    database = Database(database_url)
    with pytest.raises(Unsupported, match="registry migrate"):
        database.check()
    database.close()


def test_changes_are_numbered_and_chained(database: Database) -> None:
    assert database.sequence() == 0
    for i in range(3):
        with database.change("cli:me") as change:
            change.record("test", f"thing {i}", {"i": i})
    assert database.sequence() == 3
    assert [entry.subject for entry in database.entries(after=1)] == ["thing 1", "thing 2"]
    assert verify(database.entries()) == database.entries()[-1]


def test_a_change_that_fails_leaves_nothing(database: Database) -> None:
    def fail() -> None:
        with database.change("cli:me") as change:
            change.record("test", "thing", {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert database.sequence() == 0


def test_a_row_that_was_changed_by_hand_is_found(database: Database) -> None:
    for i in range(3):
        with database.change("cli:me") as change:
            change.record("test", f"thing {i}", {})
    with database.engine.begin() as connection:
        connection.execute(audit.update().where(audit.c.sequence == 2).values(actor="cli:somebody-else"))
    with pytest.raises(Tampered, match="entry 2"):
        verify(database.entries())


def test_a_clock_that_steps_back_does_not_put_entries_out_of_order(database_url: str) -> None:
    now = datetime(2026, 11, 25, tzinfo=UTC)
    database = Database(database_url, clock=lambda: now)
    database.migrate()
    for step in (0, -3600, 1):
        now += timedelta(seconds=step)
        with database.change("cli:me") as change:
            change.record("test", "thing", {})
    times = [entry.at for entry in database.entries()]
    assert times == sorted(times)
    database.close()


def test_writers_of_one_process_take_turns(database: Database) -> None:
    def write(i: int) -> None:
        with database.change(f"cli:{i}") as change:
            change.record("test", "thing", {})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(24)))
    assert len(database.entries()) == 24
    verify(database.entries())


_WRITER = """
import sys
from trimtab.server.database.database import Database
database = Database(sys.argv[1])
database.migrate()
for i in range(20):
    with database.change(f"cli:{sys.argv[2]}") as change:
        change.record("test", f"thing {i}", {})
"""


def test_two_processes_write_one_chain(database_url: str) -> None:
    """They start on an empty database, so both migrate it."""
    command = [sys.executable, "-c", _WRITER, database_url]
    writers = [subprocess.Popen([*command, str(i)]) for i in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    database = Database(database_url)
    assert len(database.entries()) == 40
    verify(database.entries())
    database.close()


def test_a_reader_sees_one_state_throughout(database: Database) -> None:
    with database.read() as connection:
        count = sa.select(sa.func.count()).select_from(audit)
        assert connection.execute(count).scalar_one() == 0
        with database.change("cli:me") as change:
            change.record("test", "thing", {})
        assert connection.execute(count).scalar_one() == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://x/y", "not supported"),
        ("trimtab.db", "no URL"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ],
)
def test_other_databases_are_refused(url: str, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        Database(url)


def test_a_database_that_does_not_answer_is_unavailable_and_names_no_password() -> None:
    database = Database("postgresql://trimtab:hunter2@127.0.0.1:1/nowhere")
    with pytest.raises(Unavailable, match="does not answer") as error:
        database.sequence()
    assert "hunter2" not in str(error.value)


def test_a_file_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be written"):
        Database(f"sqlite:///{tmp_path / 'file' / 'trimtab.db'}").migrate()
