"""Exposures: which reply was of which arm. Handed over without waiting, written in batches by a thread of its own.

    put ──► bounded queue ──► batch, one transaction ──► tables `exposure`, `sampled_text`

A slow or full database never slows a reply: what the queue cannot hold is dropped and counted, exactly, and the count is written
down once the database answers again; until then this replica tells it. A batch that failed is written again: the response id is
the key, so that none counts twice. What is counted beside exposures, such as requests that were not enrolled, goes the same way
as this replica's totals. Texts that were sampled go with them; fewer of them fit, as they are larger, and one that does not is
counted alone: its exposure is kept.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from trimtab.server.database.database import Database
from trimtab.server.database.schema import experiment_tally, exposure, sampled_text
from trimtab.server.errors import Unavailable
from trimtab.server.experiments.texts import SampledText

__all__ = ["DROPPED", "TEXT_DROPPED", "Exposure", "Exposures", "Status", "insert_new"]

Status = Literal["applied", "failed_open", "not_applied", "failed", "ended", "abandoned"]
"""`applied`: the reply is what the arm gives. `failed_open`: the arm's steering could not be had, and the request was served
without. `not_applied`: the engine's proof did not match the plan. `failed`: an error. `ended`: by a kill or a revocation.
`abandoned`: the client went away."""
DROPPED = "dropped"
"""The tally of exposures that were lost."""
TEXT_DROPPED = "text_dropped"
"""The tally of sampled texts that were not kept, for want of room."""
CAPACITY = 10_000
BATCH = 500
TEXT_CAPACITY = 1_000
TEXT_BATCH = 100
EVERY_SECONDS = 0.1
RETRY_SECONDS = 1.0
log = logging.getLogger("trimtab")


class Exposure(NamedTuple):
    """One reply of an experiment."""

    response_id: str
    """The request's id in the engine, without the prefix that OpenAI's replies put before it."""
    experiment: str
    arm: str
    unit: str
    """The keyed hash of the unit of randomisation."""
    revision: int
    """Of the experiment, when the arm was decided."""
    at: str
    forced: bool
    """Its arm was asked for; it is left out of the analysis."""
    triggered: bool
    """Generation was, or would have been, altered."""
    status: Status


class Exposures:
    """The exposures of one replica."""

    def __init__(self, database: Database, *, capacity: int = CAPACITY, text_capacity: int = TEXT_CAPACITY) -> None:
        self.replica = uuid4().hex
        self._database = database
        self._capacity = capacity
        self._text_capacity = text_capacity
        self._queue: deque[Exposure] = deque()
        self._texts: deque[SampledText] = deque()
        self._tallies: Counter[tuple[str, str]] = Counter()
        self._told: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._writing = self._writing_texts = 0
        self._thread = threading.Thread(target=self._run, name="trimtab-exposures", daemon=True)
        self._started = False
        self.failure: str | None = None
        """Why the last batch could not be written; None while all is well."""

    def start(self) -> None:
        """Begins to write."""
        self._started = True
        self._thread.start()

    def put(self, found: Exposure, text: SampledText | None = None) -> bool:
        """Whether there was room for it; one that is dropped is counted, and so is a text of its reply that is."""
        with self._lock:
            has_room = len(self._queue) + self._writing < self._capacity
            if has_room:
                self._queue.append(found)
            else:
                self._tallies[found.experiment, DROPPED] += 1
            if text is not None:
                if has_room and len(self._texts) + self._writing_texts < self._text_capacity:
                    self._texts.append(text)
                else:
                    self._tallies[found.experiment, TEXT_DROPPED] += 1
        return has_room

    def count(self, experiment: str, name: str) -> None:
        """One more of what is counted under a name."""
        with self._lock:
            self._tallies[experiment, name] += 1

    def tallies(self, experiment: str) -> dict[str, int]:
        """What this replica has counted of an experiment so far."""
        with self._lock:
            return {name: n for (key, name), n in self._tallies.items() if key == experiment}

    @property
    def n_waiting(self) -> int:
        """Exposures that are not written yet."""
        with self._lock:
            return len(self._queue) + self._writing

    def flush(self, seconds: float) -> bool:
        """Whether everything was written within this time; blocks."""
        deadline = time.monotonic() + seconds
        while self._pending() and self._started and self._thread.is_alive() and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.005)
        return not self._pending()

    def close(self, seconds: float = 5.0) -> None:
        """Writes what there is, and ends; what the database did not take in this time is lost, and the log says how many."""
        if not self._started:
            return
        self._closing = True
        if not self.flush(seconds):
            log.error("%d exposures were not written before the end: %s", self.n_waiting, self.failure)
        self._started = False
        self._wake.set()
        self._thread.join(seconds)

    def _pending(self) -> bool:
        with self._lock:
            waits = self._queue or self._texts or self._writing or self._writing_texts
            return bool(waits) or self._told != dict(self._tallies)

    def _run(self) -> None:
        while self._started:
            self._wake.wait(RETRY_SECONDS if self.failure and not self._closing else EVERY_SECONDS)
            self._wake.clear()
            # Whole batches at once; what is less waits for more.
            while self._started and self._pending() and self._write() and self._has_batch():
                pass

    def _has_batch(self) -> bool:
        return len(self._queue) >= BATCH or len(self._texts) >= TEXT_BATCH

    def _write(self) -> bool:
        """Whether one batch went through."""
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            texts = [self._texts.popleft() for _ in range(min(TEXT_BATCH, len(self._texts)))]
            self._writing, self._writing_texts = len(batch), len(texts)
            tallies = dict(self._tallies)
        try:
            changed = {key: n for key, n in tallies.items() if self._told.get(key) != n}
            self._insert(batch, changed, texts)
        except Exception as e:
            if self.failure is None:
                log.error("exposures cannot be written, and wait: %s", e)
            if not isinstance(e, Unavailable):
                log.exception("exposures cannot be written")
            self.failure = str(e) or type(e).__name__
            with self._lock:
                self._queue.extendleft(reversed(batch))
                self._texts.extendleft(reversed(texts))
                self._writing = self._writing_texts = 0
            return False
        if self.failure is not None:
            log.warning("exposures are written again")
        self.failure = None
        with self._lock:
            self._writing = self._writing_texts = 0
            self._told |= changed
        return True

    def _insert(
        self, batch: list[Exposure], tallies: dict[tuple[str, str], int], texts: Sequence[SampledText] = ()
    ) -> None:
        with self._database.append() as connection:
            if batch:
                insert_new(connection, exposure, [found._asdict() for found in batch])
            if texts:
                insert_new(connection, sampled_text, [text._asdict() for text in texts])
            for (experiment, name), n in tallies.items():
                here = (
                    experiment_tally.c.experiment == experiment,
                    experiment_tally.c.replica == self.replica,
                    experiment_tally.c.name == name,
                )
                if not connection.execute(experiment_tally.update().where(*here).values(count=n)).rowcount:
                    connection.execute(
                        experiment_tally.insert().values(
                            experiment=experiment, replica=self.replica, name=name, count=n
                        )
                    )


def insert_new(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """Writes the rows whose key is not there yet."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(insert(table).on_conflict_do_nothing(), rows)
