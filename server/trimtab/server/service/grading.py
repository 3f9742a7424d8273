"""Graders in the server: a share of an experiment's replies is judged after they were sent, and the verdicts are outcomes.

    put ──► bounded queue ──► a thread: grade, record        event `grader:NAME`, 1 shows, 0 lacks; unclear ones are counted alone

Nothing waits for a grader, no text is kept longer than it takes, and none is written down. What does not fit into the queue is
not graded, which is counted: it is a smaller sample, the same in every arm.
"""

import logging
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from trimtab.attribution.graders import Grader, GraderError
from trimtab.server.database.database import text_of, utc_now
from trimtab.server.errors import TrimtabError, Unavailable
from trimtab.server.experiments.definition import Grading
from trimtab.server.experiments.exposures import Exposures
from trimtab.server.experiments.outcomes import Outcome, Outcomes

__all__ = ["Graders", "Reply", "is_sampled"]

CAPACITY = 1000
BATCH = 64
THREADS = 8
RETRY_SECONDS = 1.0
log = logging.getLogger("trimtab")


class Reply(NamedTuple):
    """A reply to grade."""

    response_id: str
    experiment: str
    grading: tuple[Grading, ...]
    """Those that it was sampled for."""
    prompt: str
    completion: str


def is_sampled(response_id: str, share: float) -> bool:
    """Whether a reply is of the share; the id is random, so nothing else decides."""
    return int(response_id[:8], 16) < share * 2**32


class Graders:
    """The graders of one replica, by name."""

    def __init__(
        self, graders: Mapping[str, Grader], outcomes: Outcomes, exposures: Exposures, *, capacity: int = CAPACITY
    ) -> None:
        self.named = graders
        self._outcomes = outcomes
        self._exposures = exposures
        self._queue: queue.Queue[Reply] = queue.Queue(capacity)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="trimtab-grader") if graders else None
        self._places = {name: threading.Semaphore(max(1, grader.n_parallel)) for name, grader in graders.items()}
        self._thread = threading.Thread(target=self._run, name="trimtab-graders", daemon=True)
        self._runs = False

    def start(self) -> None:
        """Begins to grade, if there is anything to grade with."""
        if self.named:
            self._runs = True
            self._thread.start()

    def put(self, reply: Reply) -> None:
        """It will be graded, or counted as one that was not."""
        try:
            self._queue.put_nowait(reply)
        except queue.Full:
            self._exposures.count(reply.experiment, "not_graded")

    def flush(self, seconds: float) -> bool:
        """Whether all was graded within this time; blocks."""
        deadline = time.monotonic() + seconds
        while self._queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._queue.unfinished_tasks

    def close(self) -> None:
        """Grades no more."""
        if self._runs and self._pool is not None:
            self._runs = False
            self._thread.join(2.0)
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while self._runs:
            batch = self._batch()
            if not batch:
                continue
            assert self._pool is not None
            found = [one for outcomes in self._pool.map(self._graded, batch) for one in outcomes]
            while self._runs and found:
                try:
                    self._outcomes.record(tuple(found))
                except Unavailable:
                    time.sleep(RETRY_SECONDS)
                    continue
                except TrimtabError as e:
                    log.error("grades could not be recorded: %s", e.message)
                except Exception:
                    log.exception("grades could not be recorded")
                break
            for _ in batch:
                self._queue.task_done()

    def _batch(self) -> list[Reply]:
        batch: list[Reply] = []
        with suppress(queue.Empty):
            batch.append(self._queue.get(timeout=0.2))
            while len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _graded(self, reply: Reply) -> list[Outcome]:
        found = []
        for grading in reply.grading:
            value = self._value(reply, grading)
            if value is not None:
                event = f"grader:{grading.grader}"[:64]
                found.append(Outcome(reply.response_id, grading.outcome, event, value, text_of(utc_now())))
        return found

    def _value(self, reply: Reply, grading: Grading) -> float | None:
        try:
            with self._places[grading.grader]:
                grade = self.named[grading.grader].grade(reply.prompt, reply.completion)
        except GraderError as e:
            log.error("grader %s: %s", grading.grader, e)
            self._exposures.count(reply.experiment, "grader_failed")
            return None
        except Exception:
            log.exception("grader %s failed", grading.grader)
            self._exposures.count(reply.experiment, "grader_failed")
            return None
        if grading.value == "score":
            return grade.score
        if grade.verdict == "unclear":
            self._exposures.count(reply.experiment, "unclear")
            return None
        return float(grade.verdict == "shows")
