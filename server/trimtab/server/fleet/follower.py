"""Follows the database: a replica asks for the number of the last change a few times a second, and reads all anew when it moved.

One mechanism for every database and every kind of change. What is read is handed to `apply` on the event loop, without waiting.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from trimtab.server.database.database import Database
from trimtab.server.errors import TrimtabError, Unavailable
from trimtab.server.fleet.snapshot import EMPTY, Snapshot, read_snapshot

__all__ = ["Follower"]

log = logging.getLogger("trimtab")


class Follower:
    """Keeps `snapshot` at the newest state."""

    def __init__(
        self,
        database: Database,
        apply: Callable[[Snapshot], None],
        *,
        poll_seconds: float,
        stale_after_seconds: float,
    ) -> None:
        self._database = database
        self._apply = apply
        self._poll_seconds = poll_seconds
        self._stale_after_seconds = stale_after_seconds
        self._heard = time.monotonic()
        self._reading = asyncio.Lock()
        # Threads of its own: those of the loop may all be busy tokenizing.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="trimtab-follower")
        self.snapshot: Snapshot = EMPTY

    @property
    def silence_seconds(self) -> float:
        """Since the database last answered."""
        return time.monotonic() - self._heard

    @property
    def is_stale(self) -> bool:
        """Whether what is known is too old to go by."""
        return self.silence_seconds > self._stale_after_seconds

    def require_fresh(self) -> None:
        """Nothing, while the database answers.

        Raises:
            Unavailable: what is known is too old to steer by: a bundle may have been revoked meanwhile.
        """
        if self.is_stale:
            raise Unavailable(
                f"this replica has not reached its database for {self.silence_seconds:.0f} s, and steers nothing it cannot "
                "check; ask another, or again later"
            )

    async def refresh(self) -> None:
        """Reads the newest state, if it is not known yet.

        Raises:
            Unavailable: the database does not answer.
        """
        loop = asyncio.get_running_loop()
        async with self._reading:
            asked = time.monotonic()
            if await loop.run_in_executor(self._threads, self._database.sequence) != self.snapshot.sequence:
                snapshot = await loop.run_in_executor(self._threads, read_snapshot, self._database)
                self._apply(snapshot)
                self.snapshot = snapshot
            self._heard = asked

    async def run(self) -> None:
        """Follows until it is cancelled."""
        was_silent = False
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self.refresh()
            except TrimtabError as e:
                if not was_silent:
                    log.error("the database cannot be followed: %s", e.message)
                was_silent = True
            except Exception:
                log.exception("a state of the database could not be taken over; the one before goes on")
            else:
                if was_silent:
                    log.warning("the database answers again")
                was_silent = False

    def close(self) -> None:
        """Ends its threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
