"""What a purge deletes, what it leaves, and that it is finished by whoever looks next."""

from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from tests.server.experiments.examples import NOON, written
from trimtab.server.database.database import Database, text_of
from trimtab.server.database.schema import experiment_tally, exposure, outcome, sampled_text
from trimtab.server.experiments import retention
from trimtab.server.experiments.definition import TextSampling
from trimtab.server.experiments.errors import ExperimentState
from trimtab.server.experiments.exposures import Exposure, Exposures
from trimtab.server.experiments.lifecycle import Action
from trimtab.server.experiments.outcomes import Outcome, Outcomes
from trimtab.server.experiments.retention import Retention
from trimtab.server.experiments.store import Experiments
from trimtab.server.experiments.texts import Texts, sampled

KEY = "calm-replies"
ME: dict[str, Any] = {"actor": "cli:ann", "reason": "because"}
AT = text_of(NOON)


class Archive:
    """An archived experiment and one that goes on, which share a unit."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.experiments = Experiments(database)
        for key in (KEY, "other"):
            self.experiments.create(written(key=key, text={"share": 1, "days": 30}), **ME)
            self.experiments.change(key, "start", **ME)
        self.write(KEY, 0, 25)
        self.write("other", 100, 5)
        shared, mine, nobodys = "unit-3", "unit-4", "unit-nobody"
        self.write("other", 200, 1, unit=shared)
        told = [Outcome(unit, "harm-before", "", 1.0, AT) for unit in (shared, mine, nobodys)]
        Outcomes(database).record(tuple(told))
        actions: tuple[Action, ...] = ("stop", "archive")
        for action in actions:
            self.experiments.change(KEY, action, **ME)

    def write(self, key: str, first: int, n: int, unit: str | None = None) -> None:
        of = TextSampling(share=1, days=30)
        made = [
            Exposure(f"{i:032x}", key, "calm", unit or f"unit-{i}", 2, AT, False, True, "applied")
            for i in range(first, first + n)
        ]
        texts = [
            sampled(of, response_id=one.response_id, experiment=key, arm="calm", at=AT, prompt="hi", reply="ho")
            for one in made
        ]
        Exposures(self.database)._insert(made, {(key, "assigned"): n}, texts)
        Outcomes(self.database).record(tuple(Outcome(one.response_id, "harm", "", 1.0, AT) for one in made))

    def retention(self, now: datetime = NOON, **options: Any) -> Retention:
        outcomes, texts = Outcomes(self.database), Texts(self.database)
        return Retention(self.database, self.experiments, outcomes, texts, clock=lambda: now, **options)

    def counts(self) -> list[int]:
        """Exposures, outcomes, texts, tallies."""
        with self.database.read() as connection:
            tables = (exposure, outcome, sampled_text, experiment_tally)
            return [connection.execute(sa.select(sa.func.count()).select_from(t)).scalar_one() for t in tables]


@pytest.fixture
def archive(database: Database) -> Archive:
    return Archive(database)


def test_a_purge_deletes_what_was_measured_and_nothing_of_anybody_else(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches smaller than the experiment; the outcome of a unit that another experiment has seen is that one's too."""
    monkeypatch.setattr(retention, "BATCH", 7)
    assert archive.counts() == [31, 31 + 3, 6, 3]
    archive.experiments.change(KEY, "purge", **ME)
    assert archive.retention().sweep() == 25 + 25 + 1
    assert archive.counts() == [6, 6 + 2, 6, 2]
    assert archive.retention().sweep() == 0
    entry = archive.database.entries()[-1]
    assert (entry.action, entry.detail["exposures"], entry.detail["reason"]) == ("experiment.purge", 25, "because")
    assert archive.experiments.find(KEY).definition.key == KEY
    assert [change["action"] for change in archive.experiments.history(KEY)][-2:] == ["archive", "purge"]
    with pytest.raises(ExperimentState, match=r"was purged on .*: what it measured was deleted"):
        archive.experiments.measured(KEY)


def test_an_experiment_that_goes_on_cannot_be_purged(archive: Archive) -> None:
    with pytest.raises(ExperimentState, match=r"is running: it allows .*, not purge"):
        archive.experiments.change("other", "purge", **ME)


def test_what_a_crash_left_or_came_late_goes_at_the_next_look(archive: Archive) -> None:
    archive.experiments.change(KEY, "purge", **ME)
    archive.write(KEY, 500, 2)
    archive.retention().look()
    assert archive.counts()[0] == 6


def test_a_replica_that_starts_deletes_texts_that_are_past_their_days(archive: Archive) -> None:
    for days, left in ((29.9, 6), (30.1, 0)):
        archive.retention(NOON + timedelta(days=days)).look()
        assert archive.counts()[2] == left


def test_nothing_is_purged_by_itself_unless_days_are_set_and_then_once(archive: Archive) -> None:
    archived_at = archive.experiments.find(KEY).changed_at
    for days, options, state in (
        (10_000, {}, "archived"),
        (29, {"purge_after_days": 30}, "archived"),
        (-400, {"purge_after_days": 30}, "archived"),
        (30, {"purge_after_days": 30}, "purged"),
        (31, {"purge_after_days": 30}, "purged"),
    ):
        archive.retention(archived_at + timedelta(days=days), **options).look()
        assert archive.experiments.find(KEY).state == state
    trail = archive.experiments.history(KEY)
    assert [change["action"] for change in trail].count("purge") == 1
    assert (trail[-1]["actor"], trail[-1]["reason"]) == ("server", "it was archived 30 days ago (purge_after_days)")
    assert archive.counts()[0] == 6
