"""Experiments, exposures and outcomes in a real database."""

import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from tests.server.experiments.examples import NOON, experiment, written
from trimtab.server.database.audit import verify
from trimtab.server.database.database import Database, text_of
from trimtab.server.database.schema import exposure as exposure_table
from trimtab.server.errors import Conflict, InvalidRequest, Unavailable
from trimtab.server.experiments.errors import ExperimentState, InvalidExperiment, StaleRevision, UnknownExperiment
from trimtab.server.experiments.exposures import DROPPED, Exposure, Exposures, Status
from trimtab.server.experiments.lifecycle import Action
from trimtab.server.experiments.measurements import Measurements
from trimtab.server.experiments.outcomes import Outcomes, parse_outcomes, unit_digest
from trimtab.server.experiments.store import Experiments

KEY = "calm-replies"
ME: dict[str, Any] = {"actor": "cli:ann", "reason": "because"}


def digest(text: str) -> str:
    return f"{abs(hash(text)):064x}"


def exposed(
    i: int, arm: str = "control", unit: str | None = None, revision: int = 2, status: Status = "applied", **changes: Any
) -> Exposure:
    at = text_of(NOON + timedelta(seconds=i))
    made = Exposure(f"{i:032x}", KEY, arm, unit or f"unit-{i}", revision, at, False, True, status)
    return made._replace(**changes)


@pytest.fixture
def experiments(database: Database) -> Experiments:
    store = Experiments(database)
    store.create(written(), **ME)
    return store


def test_what_was_written_down_is_read_back(experiments: Experiments) -> None:
    found = experiments.find(KEY)
    assert found.definition == experiment()
    assert (found.state, found.coverage, found.revision) == ("draft", 0.0, 1)
    assert experiments.list() == (found,)
    assert experiments.list(state="running") == ()


def test_every_change_is_in_the_trail_and_in_the_audit_log_with_actor_and_reason(
    experiments: Experiments, database: Database
) -> None:
    actions: tuple[Action, ...] = ("start", "pause", "resume", "stop", "archive")
    for action in actions:
        experiments.change(KEY, action, actor="key:bob", reason=f"to {action}")
    trail = experiments.history(KEY)
    assert [entry["action"] for entry in trail] == ["create", *actions]
    assert [entry["state"] for entry in trail] == ["draft", "running", "paused", "running", "stopped", "archived"]
    assert (trail[-1]["actor"], trail[-1]["reason"]) == ("key:bob", "to archive")
    audited = database.entries()
    assert [entry.action for entry in audited] == [f"experiment.{action}" for action in ("create", *actions)]
    assert audited[1].detail["reason"] == "to start"
    verify(audited)


def test_a_key_is_taken_for_good(experiments: Experiments) -> None:
    experiments.change(KEY, "archive", **ME)
    with pytest.raises(Conflict, match="already"):
        experiments.create(written(), **ME)


def test_edits_after_the_start_are_refused_and_leave_nothing(experiments: Experiments, database: Database) -> None:
    experiments.edit(KEY, written(alpha=0.1), **ME)
    assert experiments.find(KEY).definition.alpha == 0.1
    experiments.change(KEY, "start", **ME)
    sequence = database.sequence()
    with pytest.raises(ExperimentState, match="immutable once started"):
        experiments.edit(KEY, written(alpha=0.2), **ME)
    assert (experiments.find(KEY).definition.alpha, database.sequence()) == (0.1, sequence)


def test_weights_that_do_not_sum_to_one_are_refused_with_the_sum(database: Database) -> None:
    arms = [{"key": "a", "weight": 0.5}, {"key": "b", "weight": 0.4, "system_prompt": "x"}]
    with pytest.raises(InvalidExperiment, match=r"sum to 1, not 0\.9"):
        Experiments(database).create(written(arms=arms), **ME)
    assert database.sequence() == 0


def test_a_stale_replica_does_not_undo_what_it_has_not_seen(experiments: Experiments) -> None:
    experiments.change(KEY, "start", **ME)
    with pytest.raises(StaleRevision):
        experiments.change(KEY, "pause", revision=1, **ME)


@pytest.mark.parametrize("key", ["nowhere", "", "a\0b", "x" * 10_000])
def test_an_experiment_that_is_not_there_is_said_to_be_unknown(experiments: Experiments, key: str) -> None:
    with pytest.raises(UnknownExperiment):
        experiments.find(key)


@pytest.mark.parametrize("reason", ["", " ", "\0", "x" * 2000])
def test_every_change_needs_a_reason(experiments: Experiments, reason: str) -> None:
    with pytest.raises(InvalidRequest, match="reason"):
        experiments.change(KEY, "start", actor="ann", reason=reason)


def test_the_clock_may_step_back_between_changes(database_url: str) -> None:
    now = NOON
    database = Database(database_url, clock=lambda: now)
    database.migrate()
    store = Experiments(database)
    store.create(written(), **ME)
    now = NOON - timedelta(days=3)
    record = store.change(KEY, "start", **ME)
    assert record.started_at == record.changed_at == NOON
    assert [entry["at"] for entry in store.history(KEY)] == [text_of(NOON)] * 2
    database.close()


def test_the_global_holdout_is_a_share_and_audited(experiments: Experiments, database: Database) -> None:
    assert experiments.hold_out(0.05, **ME) == 0.05
    with pytest.raises(InvalidRequest):
        experiments.hold_out(1.0, **ME)
    assert database.entries()[-1].detail == {"before": 0.0, "share": 0.05, "reason": "because"}


def test_all_exposures_are_written_and_tallies_are_totals(experiments: Experiments, database: Database) -> None:
    log = Exposures(database)
    log.start()
    for i in range(1500):
        assert log.put(exposed(i))
        log.count(KEY, "missing_unit")
    assert log.flush(20)
    log.count(KEY, "missing_unit")
    log.close()
    measured = Measurements(database).read(experiments.find(KEY))
    assert measured.arms[0].n_requests == 1500
    assert measured.tallies == {"missing_unit": 1501}


def test_a_broken_sink_holds_nobody_up_and_every_loss_is_counted(database: Database) -> None:
    """The table is gone for a while: what the queue holds is written afterwards, the rest is counted, exactly."""
    record = Experiments(database).create(written(), **ME)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE exposure RENAME TO gone")
    log = Exposures(database, capacity=100)
    log.start()
    start = time.perf_counter()
    kept = sum(log.put(exposed(i)) for i in range(250))
    assert time.perf_counter() - start < 0.1
    assert (kept, log.tallies(KEY)) == (100, {DROPPED: 150})
    deadline = time.monotonic() + 10
    while log.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert log.failure is not None
    assert log.n_waiting == 100
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO exposure")
    log.close()
    measured = Measurements(database).read(record)
    assert measured.arms[0].n_requests == 100
    assert measured.tallies[DROPPED] == 150


def test_a_locked_database_is_waited_for_and_nothing_is_lost(database: Database) -> None:
    record = Experiments(database).create(written(), **ME)
    log = Exposures(database)
    log.start()
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with database.append() as connection:
            connection.execute(exposure_table.insert().values(**exposed(9999)._asdict()))
            locked.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait(10)
    assert all(log.put(exposed(i)) for i in range(700))
    time.sleep(0.3)
    done.set()
    holder.join()
    log.close()
    assert Measurements(database).read(record).arms[0].n_requests == 701


def test_a_batch_that_is_written_twice_counts_once(database: Database) -> None:
    """A commit whose answer is lost is written again."""
    record = Experiments(database).create(written(), **ME)
    log = Exposures(database)
    log._insert([exposed(i) for i in range(5)], {(KEY, "coverage"): 3})
    log._insert([exposed(i) for i in range(5)], {(KEY, "coverage"): 3})
    measured = Measurements(database).read(record)
    assert (measured.arms[0].n_requests, measured.tallies) == (5, {"coverage": 3})


def told(database: Database, *given: dict[str, Any], now: datetime = NOON) -> dict[str, int]:
    return Outcomes(database).record(parse_outcomes(given, digest, now=now), now=now)


def of(i: int, value: float = 1.0, name: str = "harm", **more: Any) -> dict[str, Any]:
    return {"response_id": f"chatcmpl-{i:032x}", "name": name, "value": value, **more}


def write(database: Database, *exposures: Exposure) -> None:
    Exposures(database)._insert(list(exposures), {})


def test_telling_an_outcome_again_changes_nothing(database: Database) -> None:
    write(database, exposed(1))
    assert told(database, of(1), of(1)) == {"recorded": 1, "duplicate": 1, "pending": 0}
    assert told(database, of(1)) == {"recorded": 0, "duplicate": 1, "pending": 0}
    assert told(database, of(1, event="again")) == {"recorded": 1, "duplicate": 0, "pending": 0}


def test_another_value_of_a_known_outcome_is_a_conflict_and_nothing_of_the_call_is_kept(database: Database) -> None:
    write(database, exposed(1), exposed(2))
    told(database, of(1))
    for given in ((of(2), of(1, 0.5)), (of(2), of(2, 0.5))):
        with pytest.raises(Conflict, match=r"outcomes\[1\]"):
            told(database, *given)
    assert told(database, of(2)) == {"recorded": 1, "duplicate": 0, "pending": 0}


def test_an_outcome_before_its_exposure_waits_and_then_counts(experiments: Experiments, database: Database) -> None:
    assert told(database, of(1)) == {"recorded": 1, "duplicate": 0, "pending": 1}
    write(database, exposed(1))
    units = Measurements(database).read(experiments.find(KEY)).units
    assert units.outcome("harm").tolist() == [1.0]


def test_an_outcome_that_comes_long_after_the_end_counts(experiments: Experiments, database: Database) -> None:
    write(database, exposed(1))
    actions: tuple[Action, ...] = ("start", "stop", "archive")
    for action in actions:
        experiments.change(KEY, action, **ME)
    late = NOON + timedelta(days=400)
    assert told(database, of(1), now=late) == {"recorded": 1, "duplicate": 0, "pending": 0}
    assert Outcomes(database).forget_pending(now=late + timedelta(days=400)) == 0
    assert Measurements(database).read(experiments.find(KEY)).units.outcome("harm").tolist() == [1.0]


def test_what_a_locked_database_does_not_take_is_said_and_may_be_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.server.database.database.BUSY_SECONDS", 0.2)
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    write(database, exposed(1))
    with database.append():
        for ask in (lambda: told(database, of(1)), lambda: Experiments(database).create(written(), **ME)):
            with pytest.raises(Unavailable, match=r"does not answer \(database is locked\); ask again"):
                ask()
    assert told(database, of(1)) == {"recorded": 1, "duplicate": 0, "pending": 0}
    assert Experiments(database).create(written(), **ME).revision == 1
    database.close()


def test_what_nobody_has_heard_of_for_a_week_is_forgotten_and_nothing_else(database: Database) -> None:
    write(database, exposed(1))
    told(database, of(1), of(2), {"unit": {"user": "u"}, "name": "harm", "value": 1})
    assert Outcomes(database).forget_pending(now=NOON + timedelta(days=6)) == 0
    assert Outcomes(database).forget_pending(now=NOON + timedelta(days=8)) == 1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ([], "outcomes"),
        ([of(1)] * 1001, "outcomes"),
        ([of(1, float("nan"))], "outcomes[0].value"),
        ([of(1), of(2, name="Harm!")], "outcomes[1].name"),
        ([of(1, event="\0")], "outcomes[0].event"),
        ([of(1, at="2031-01-01T00:00:00Z")], "outcomes[0].at"),
        ([of(1, at="2026-01-01T00:00:00")], "outcomes[0].at"),
        ([of(1, at="0001-01-01T00:00:00+01:00")], "outcomes[0].at"),
        ([of(1) | {"response_id": "chatcmpl-of-another-server"}], "outcomes[0].response_id"),
        ([of(1) | {"response_id": "\0" * 32}], "outcomes[0].response_id"),
        ([of(1) | {"response_id": "x" * 1_000_000}], "outcomes[0].response_id"),
        ([{"name": "harm", "value": 1}], "outcomes[0]"),
        ([of(1) | {"unit": {"user": "u"}}], "outcomes[0]"),
        ([{"unit": {"user": "x" * 1_000_000}, "name": "harm", "value": 1}], "outcomes[0].unit.user"),
        ([{"unit": {"user": "a\0"}, "name": "harm", "value": 1}], "outcomes[0].unit"),
        ([of(1) | {"arm": "calm"}], "outcomes[0].arm"),
    ],
)
def test_what_is_no_outcome_is_refused_by_the_path_of_its_field(given: list[Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_outcomes(given, digest, now=NOON)
    assert refused.value.field == field


def test_units_are_measured_by_their_replies_and_by_what_is_told_of_them(
    experiments: Experiments, database: Database
) -> None:
    primary = {"key": "harm", "outcome": "harm", "covariate": "harm-before"}
    experiments.edit(KEY, written(primary=primary), **ME)
    ada, bob = (unit_digest(digest, "user", name) for name in ("ada", "bob"))
    write(
        database,
        exposed(10, "control", ada),
        exposed(20, "control", ada, status="failed_open"),
        exposed(10, "calm", bob, response_id="b" * 32, triggered=False),
        exposed(30, "calm", "moved", response_id="c" * 32),
        exposed(31, "control", "moved", response_id="d" * 32),
        exposed(40, "calm", "asked", response_id="e" * 32, forced=True),
    )
    early, late = (text_of(NOON + timedelta(seconds=s)) for s in (5, 15))
    told(
        database,
        of(10, 1.0),
        of(20, 0.5),
        {"unit": {"user": "ada"}, "name": "harm", "value": 0.25, "at": late},
        {"unit": {"user": "ada"}, "name": "harm", "value": 9.0, "event": "early", "at": early},
        {"unit": {"user": "ada"}, "name": "harm-before", "value": 3.0, "at": early},
        {"unit": {"user": "bob"}, "name": "harm-before", "value": 7.0, "at": late},
    )
    measured = Measurements(database).read(experiments.find(KEY))
    units = measured.units
    of_arm = {int(arm): i for i, arm in enumerate(units.arm_U)}
    assert sorted(of_arm) == [0, 1]
    a, b = of_arm[0], of_arm[1]
    assert (units.outcome("harm")[a], units.outcome("harm")[b]) == (1.75, 0.0)
    assert (units.outcome("harm-before")[a], units.outcome("harm-before")[b]) == (0.0, 7.0)
    assert (units.covariates["harm-before"][a], units.covariates["harm"][a]) == (3.0, 9.0)
    assert np.isnan(units.covariates["harm-before"][b])
    assert (units.reported("harm")[a], units.reported("harm")[b]) == (True, False)
    assert measured.enrolled_at[a] == text_of(NOON + timedelta(seconds=10))
    assert (units.complied_U[a], units.complied_U[b]) == (False, True)
    assert (units.triggered_U[a], units.triggered_U[b]) == (True, False)
    assert measured.n_crossovers == 1
    assert measured.arms[0].statuses == {"applied": 2, "failed_open": 1}
    assert measured.counts_EK == [[1, 1, 0]]


def test_units_count_in_the_stretch_of_their_first_exposure(experiments: Experiments, database: Database) -> None:
    experiments.edit(KEY, written(ramp=[{"coverage": 0.1}]), **ME)
    started = experiments.change(KEY, "start", **ME).revision
    experiments.change(KEY, "pause", **ME)
    experiments.change(KEY, "resume", **ME)
    ramped = experiments.change(KEY, "ramp", coverage=0.5, **ME).revision
    write(
        database,
        exposed(1, unit="old", revision=started),
        exposed(2, unit="old", revision=ramped),
        exposed(3, unit="new", revision=ramped),
    )
    measured = Measurements(database).read(experiments.find(KEY))
    assert measured.counts_EK == [[1, 0, 0], [1, 0, 0]]
    assert len(measured.shares_EK) == 2


def test_an_export_in_pages_is_whole(database: Database) -> None:
    write(database, *(exposed(i, unit=f"unit-{i % 7}") for i in range(50)))
    told(database, *(of(i, float(i), event=str(e)) for i in range(50) for e in range(2)))
    for page in (Measurements(database).exposures, Measurements(database).outcomes):
        cursor = "response_id"
        rows: list[Any] = []
        while found := page(KEY, after=rows[-1][cursor] if rows else "", limit=7):
            rows += found
        assert len({row["response_id"] for row in rows}) == 50
    assert len(rows) == 100
    assert {row["value"] for row in rows} == set(map(float, range(50)))


def test_exposures_are_no_changes_of_the_fleet(experiments: Experiments, database: Database) -> None:
    sequence = database.sequence()
    write(database, exposed(1))
    told(database, of(1))
    assert database.sequence() == sequence
    with database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(exposure_table)).scalar_one() == 1
