"""The server looks by itself, and acts once, whoever else looks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from tests.server.experiments.examples import HOUR, NOON, written
from trimtab.server.database.database import Database, text_of
from trimtab.server.experiments.documents import results_of
from trimtab.server.experiments.exposures import Exposure, Exposures, Status
from trimtab.server.experiments.keeper import Keeper
from trimtab.server.experiments.lifecycle import Record
from trimtab.server.experiments.measurements import Measurements
from trimtab.server.experiments.outcomes import Outcome, Outcomes
from trimtab.server.experiments.safety import Advice
from trimtab.server.experiments.store import ACTOR, Experiments

KEY = "calm-replies"
RAMP = [{"coverage": 0.1, "hold_hours": 1, "min_units": 4}, {"coverage": 0.5}]
RUDE = {"key": "rude", "outcome": "rude", "direction": "decrease"}
ARMS = [{"key": "control", "weight": 0.5}, {"key": "calm", "weight": 0.5, "system_prompt": "Stay calm."}]


class House:
    """Two keepers over one database, and a clock."""

    def __init__(self, url: str, **changes: Any) -> None:
        self.now = NOON
        self.database = Database(url, clock=lambda: self.now)
        self.database.migrate()
        self.experiments = Experiments(self.database)
        self.measurements = Measurements(self.database)
        self.outcomes = Outcomes(self.database)
        self.keepers = [self.keeper(), self.keeper()]
        rails = [{"metric": RUDE, "margin": 0.1}]
        definition = written(**({"arms": ARMS, "ramp": RAMP, "guardrails": rails} | changes))
        self.experiments.create(definition, actor="ann", reason="new")
        self.experiments.change(KEY, "start", actor="ann", reason="go")

    def keeper(self) -> Keeper:
        return Keeper(self.experiments, self.measurements, every_seconds=5, clock=lambda: self.now)

    def look(self) -> Any:
        for keeper in self.keepers:
            assert keeper.look() >= 5
        return self.experiments.find(KEY)

    def expose(self, n: int, status: Status = "applied", rude: float = 0.0) -> None:
        """So many units in each arm; in the treated one with this status and outcome."""
        made, told = [], []
        for i in range(2 * n):
            arm = ("control", "calm")[i % 2]
            how: Status = status if i % 2 else "applied"
            id_ = f"{i:032x}"
            made.append(Exposure(id_, KEY, arm, f"unit-{i}", 2, text_of(NOON), False, True, how))
            # A little spread, without which nothing is concluded.
            value = (rude if i % 2 else 0.0) + 0.01 * (i % 4 // 2)
            told.append(Outcome(id_, "rude", "", value, text_of(NOON)))
        Exposures(self.database)._insert(made, {})
        self.outcomes.record(tuple(told[:1000]))


@pytest.fixture
def house(database_url: str) -> Any:
    house = House(database_url)
    yield house
    house.database.close()


def test_a_step_of_the_ramp_is_taken_once_its_hold_and_units_are_there(house: House) -> None:
    house.expose(1)
    house.now += HOUR
    assert house.look().coverage == 0.1
    house.expose(2)
    assert house.look().coverage == 0.5
    last = house.experiments.history(KEY)[-1]
    assert (last["action"], last["actor"], last["reason"]) == (
        "advance",
        ACTOR,
        "the ramp schedule: coverage 0.1 → 0.5",
    )
    assert len(house.experiments.history(KEY)) == 3


def test_a_clock_that_steps_back_takes_no_step(house: House) -> None:
    house.expose(5)
    house.now -= timedelta(days=2)
    record = house.look()
    assert (record.coverage, record.state) == (0.1, "running")
    found = results_of(record, house.measurements.read(record), house.now)
    assert (sum(found.n_units), found.days_left, found.over) == (10, None, None)


def test_a_breached_guardrail_rolls_back_once(house: House) -> None:
    house.expose(200, rude=0.5)
    record = house.look()
    assert (record.state, record.coverage) == ("stopped", 0.0)
    trail = house.experiments.history(KEY)
    assert [entry["action"] for entry in trail] == ["create", "start", "rollback"]
    assert trail[-1]["reason"].startswith("guardrail rude: arm calm is worse by 0.5")
    assert house.database.entries()[-1].action == "experiment.rollback"


def test_an_automatic_stop_rule_is_acted_on_once_over_replicas_that_look_at_once(database_url: str) -> None:
    """Every keeper has read the experiment as it ran, and decides to stop it; one of them does."""
    house = House(database_url, stop={"max_days": 1, "automatic": True}, ramp=[{"coverage": 1.0}])
    house.expose(5)
    assert house.look().state == "running"
    house.now += timedelta(days=1)
    looks = threading.Barrier(4)

    def look() -> None:
        keeper = house.keeper()
        follow = keeper._follow

        def together(record: Record, advice: Advice) -> None:
            looks.wait(20)
            follow(record, advice)

        keeper._follow = together  # type: ignore[method-assign]
        assert keeper.look() >= 5

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(look) for _ in range(4)]:
            done.result()
    record = house.look()
    assert (record.state, record.coverage, record.ends_running) == ("stopped", 0.0, False)
    trail = house.experiments.history(KEY)
    assert [entry["action"] for entry in trail] == ["create", "start", "stop"]
    assert (trail[-1]["actor"], trail[-1]["reason"]) == (ACTOR, "the stop rule: max_days (1) are over")
    assert [entry.action for entry in house.database.entries()].count("experiment.stop") == 1
    house.database.close()


def test_a_stop_rule_that_is_not_automatic_is_told_and_left_to_people(database_url: str) -> None:
    house = House(database_url, stop={"max_units": 10}, ramp=[{"coverage": 1.0}])
    house.expose(50)
    record = house.look()
    found = results_of(record, house.measurements.read(record), house.now)
    assert (record.state, found.over) == ("running", "max_units")
    house.database.close()


def test_replies_that_were_not_steered_as_asked_roll_back(house: House) -> None:
    house.expose(1, status="not_applied")
    assert house.look().state == "stopped"


def test_what_is_fine_is_left_alone(house: House) -> None:
    house.expose(200)
    assert house.look().state == "running"
