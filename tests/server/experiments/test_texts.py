"""Sampled texts: bounded, for so many days, and read by nobody unseen."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.server.experiments.examples import NOON, written
from trimtab.server.database.database import Database, text_of
from trimtab.server.experiments.definition import TextSampling
from trimtab.server.experiments.exposures import DROPPED, TEXT_DROPPED, Exposure, Exposures
from trimtab.server.experiments.measurements import Measurements
from trimtab.server.experiments.store import Experiments
from trimtab.server.experiments.texts import MAX_CHARACTERS, SampledText, Texts, sampled

KEY = "calm-replies"
ME: dict[str, Any] = {"actor": "cli:ann", "reason": "because"}
TEXT = {"share": 0.5, "days": 2}


def exposed(i: int) -> Exposure:
    return Exposure(f"{i:032x}", KEY, "calm", f"unit-{i}", 2, text_of(NOON), False, True, "applied")


def said(i: int, prompt: str = "hi", reply: str = "ho", key: str = KEY) -> SampledText:
    of = {"response_id": f"{i:032x}", "experiment": key, "arm": "calm", "at": text_of(NOON)}
    return sampled(TextSampling(share=0.5, days=2), **of, prompt=prompt, reply=reply)


@pytest.fixture
def noon(database_url: str) -> Any:
    """A database at noon."""
    database = Database(database_url, clock=lambda: NOON)
    database.migrate()
    yield database
    database.close()


def read(database: Database, *, after: str = "", limit: int = 100) -> list[dict[str, Any]]:
    return Texts(database).read(KEY, after=after, limit=limit, actor="key:bob")


def test_a_text_is_written_with_its_exposure(noon: Database) -> None:
    log = Exposures(noon)
    log.start()
    for i in range(250):
        assert log.put(exposed(i), said(i) if i % 2 else None)
    log.close()
    assert read(noon, limit=1) == [
        {"response_id": f"{1:032x}", "experiment": KEY, "arm": "calm", "at": text_of(NOON),
         "until": text_of(NOON + timedelta(days=2)), "prompt": "hi", "reply": "ho", "cut": False}
    ]  # fmt: skip
    assert len(read(noon, limit=1000)) == 125


@pytest.mark.parametrize(
    "hostile",
    ["\0", "\ud800", "\0\udfff" * MAX_CHARACTERS, "\U0001f600" * 1_000_000, ""],
    ids=["nul", "half a pair", "both", "4 MB", "nothing"],
)
def test_no_text_keeps_the_database_from_its_batch_and_none_is_long(noon: Database, hostile: str) -> None:
    log = Exposures(noon)
    log.start()
    assert log.put(exposed(1), said(1, hostile, hostile))
    log.close()
    (row,) = read(noon)
    assert row["prompt"] == row["reply"]
    assert len(row["prompt"]) == min(len(hostile), MAX_CHARACTERS)
    assert row["cut"] == (len(hostile) > MAX_CHARACTERS)
    assert "\0" not in row["prompt"]


def test_texts_that_do_not_fit_are_counted_and_cost_no_exposure(noon: Database) -> None:
    record = Experiments(noon).create(written(text=TEXT), **ME)
    log = Exposures(noon, capacity=20, text_capacity=5)
    kept = [log.put(exposed(i), said(i)) for i in range(25)]
    assert (kept.count(True), log.tallies(KEY)) == (20, {DROPPED: 5, TEXT_DROPPED: 20})
    log.start()
    log.close()
    assert (Measurements(noon).read(record).arms[1].n_requests, len(read(noon))) == (20, 5)


def test_each_page_that_is_read_is_in_the_audit_log(noon: Database) -> None:
    Exposures(noon)._insert([], {}, [said(i) for i in range(5)])
    first = read(noon, limit=3)
    assert [row["response_id"] for row in read(noon, after=first[-1]["response_id"])] == [f"{i:032x}" for i in (3, 4)]
    audited = [(entry.actor, entry.action, entry.subject, entry.detail) for entry in noon.entries()]
    assert audited == [
        ("key:bob", "experiment.texts", KEY, {"after": "", "count": 3}),
        ("key:bob", "experiment.texts", KEY, {"after": f"{2:032x}", "count": 2}),
    ]


def test_a_text_that_is_past_its_days_is_shown_to_nobody_and_then_gone(database_url: str) -> None:
    now = NOON
    database = Database(database_url, clock=lambda: now)
    database.migrate()
    Exposures(database)._insert([], {}, [said(1)])
    now = NOON + timedelta(days=2)
    assert read(database) == []
    assert Texts(database).forget(now=NOON + timedelta(days=1)) == 0
    assert Texts(database).forget(now=now) == 1
    database.close()


def test_archiving_deletes_the_texts_and_says_how_many(noon: Database) -> None:
    experiments = Experiments(noon)
    experiments.create(written(text=TEXT), **ME)
    experiments.create(written(key="other"), **ME)
    Exposures(noon)._insert([], {}, [said(1), said(2), said(3, key="other")])
    experiments.change(KEY, "archive", **ME)
    assert noon.entries()[-1].detail["texts_deleted"] == 2
    Exposures(noon)._insert([], {}, [said(4)])  # Of a request that outlived its experiment.
    assert Texts(noon).forget(now=NOON) == 1
    assert read(noon) == []


def test_what_is_deleted_is_not_left_in_the_files_of_sqlite(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    Exposures(database)._insert([], {}, [said(1, reply="a secret of mine")])
    database.close()

    def is_there() -> bool:
        return any(b"a secret of mine" in file.read_bytes() for file in tmp_path.iterdir())

    assert is_there()
    assert Texts(database).forget(now=NOON + timedelta(days=3)) == 1
    database.close()
    assert not is_there()
