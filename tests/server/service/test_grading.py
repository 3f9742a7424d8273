"""Graders judge after the reply, hold nobody up, and their verdicts are outcomes."""

import threading
import time
from collections.abc import Iterator

import pytest

from trimtab.attribution.graders import Grade, GraderError
from trimtab.server.database.database import Database
from trimtab.server.experiments.definition import Grading
from trimtab.server.experiments.exposures import Exposures
from trimtab.server.experiments.outcomes import Outcomes
from trimtab.server.service.grading import Graders, Reply, is_sampled

RUDE = Grading(grader="rude", outcome="harm")


class Rude:
    """A grader that can be made to wait."""

    name, digest, n_parallel = "rude", "sha256:0", 1

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()

    def grade(self, prompt: str, completion: str) -> Grade:
        """By one word."""
        self.go.wait(10)
        if completion == "?":
            raise GraderError("no answer")
        return Grade("unclear" if not completion else "shows" if "fool" in completion else "lacks", 0.5)

    def usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """Nobody charges."""
        return None


class Bench:
    """Graders over a database."""

    def __init__(self, database: Database) -> None:
        self.rude = Rude()
        self.exposures = Exposures(database)
        self.database = database
        self.graders = Graders({"rude": self.rude}, Outcomes(database), self.exposures, capacity=5)
        self.graders.start()

    def put(self, i: int, completion: str, grading: Grading = RUDE) -> None:
        self.graders.put(Reply(f"{i:032x}", "e", (grading,), "hi", completion))

    def recorded(self) -> list[tuple[str, str, float]]:
        assert self.graders.flush(10)
        with self.database.read() as connection:
            rows = connection.exec_driver_sql("SELECT name, event, value FROM outcome ORDER BY subject")
            return [tuple(row) for row in rows]


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    bench = Bench(database)
    yield bench
    bench.graders.close()


def test_a_verdict_is_an_outcome_and_an_unclear_one_is_only_counted(bench: Bench) -> None:
    for i, said in enumerate(("you fool", "dear friend", "", "?")):
        bench.put(i, said)
    assert bench.recorded() == [("harm", "grader:rude", 1.0), ("harm", "grader:rude", 0.0)]
    assert bench.exposures.tallies("e") == {"unclear": 1, "grader_failed": 1}


def test_a_score_may_be_the_outcome(bench: Bench) -> None:
    bench.put(1, "dear friend", Grading(grader="rude", outcome="tone", value="score"))
    assert bench.recorded() == [("tone", "grader:rude", 0.5)]


def test_a_slow_grader_holds_nobody_up_and_what_is_not_graded_is_counted(bench: Bench) -> None:
    bench.rude.go.clear()
    bench.put(0, "fool")
    time.sleep(0.4)  # The thread has taken it.
    start = time.perf_counter()
    for i in range(1, 21):
        bench.put(i, "fool")
    assert time.perf_counter() - start < 0.1
    assert bench.exposures.tallies("e") == {"not_graded": 15}
    bench.rude.go.set()
    assert len(bench.recorded()) == 6


def test_the_share_of_replies_is_drawn_by_their_ids() -> None:
    ids = [f"{i * 2654435761 % 2**32:08x}" + "0" * 24 for i in range(10_000)]
    assert sum(is_sampled(i, 0.2) for i in ids) == pytest.approx(2000, abs=100)
    assert all(is_sampled(i, 1.0) for i in ids)
