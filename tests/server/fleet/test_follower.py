"""A replica takes over what another process writes, well within a second, and says when it cannot."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

from tests.processes import WITHIN
from trimtab.server.database.database import Database
from trimtab.server.errors import Unavailable
from trimtab.server.fleet.follower import Follower
from trimtab.server.fleet.snapshot import Snapshot
from trimtab.server.fleet.switch import KillSwitch

_WRITER = """
import sys, time
from trimtab.server.database.database import Database
from trimtab.server.fleet.switch import KillSwitch
switch = KillSwitch(Database(sys.argv[1]))
for i in range(int(sys.argv[2])):
    time.sleep(0.13)
    switch.throw("unsteered" if i % 2 == 0 else "off", actor="cli:other", reason=repr(time.time()))
"""


class Seen:
    """What a follower handed over, and when."""

    def __init__(self, database: Database, poll_seconds: float = 0.1) -> None:
        self.snapshots: list[tuple[float, Snapshot]] = []
        self.follower = Follower(database, self._apply, poll_seconds=poll_seconds, stale_after_seconds=0.6)

    def _apply(self, snapshot: Snapshot) -> None:
        self.snapshots.append((time.time(), snapshot))


@pytest.fixture
async def seen(database: Database) -> AsyncIterator[Seen]:
    seen = Seen(database)
    await seen.follower.refresh()
    task = asyncio.create_task(seen.follower.run())
    yield seen
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    seen.follower.close()


async def test_what_another_process_writes_is_here_within_a_second(seen: Seen, database_url: str) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, database_url, "10"])
    try:
        deadline = time.monotonic() + 60
        while seen.follower.snapshot.sequence < 10 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
    finally:
        assert await asyncio.to_thread(writer.wait, 30) == 0
    delays = [at - float(snapshot.switch.reason) for at, snapshot in seen.snapshots if snapshot.switch.reason]
    assert len(delays) >= 5
    assert max(delays) < WITHIN


async def test_a_change_of_ones_own_is_here_when_it_is_refreshed(database: Database) -> None:
    seen = Seen(database, poll_seconds=0.5)
    KillSwitch(database).throw("refuse", actor="cli:me", reason="x")
    await seen.follower.refresh()
    assert [snapshot.switch.mode for _, snapshot in seen.snapshots] == ["refuse"]
    await seen.follower.refresh()
    assert len(seen.snapshots) == 1
    seen.follower.close()


async def test_a_replica_that_cannot_reach_the_database_knows_that_it_is_stale(
    seen: Seen, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    seen.follower.require_fresh()
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE audit RENAME TO gone")
    await asyncio.sleep(0.9)
    assert seen.follower.is_stale
    with pytest.raises(Unavailable, match="has not reached its database"):
        seen.follower.require_fresh()
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO audit")
    await asyncio.sleep(0.4)
    seen.follower.require_fresh()
    assert [record.message for record in caplog.records][-1] == "the database answers again"
    assert sum("cannot be followed" in record.message for record in caplog.records) == 1
