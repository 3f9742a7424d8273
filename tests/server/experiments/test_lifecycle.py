"""The states of an experiment and the trail that every change leaves."""

from datetime import timedelta
from itertools import pairwise
from typing import get_args

import pytest

from tests.server.experiments.examples import HOUR, NOON, experiment, running
from trimtab.server.experiments.errors import ExperimentState, StaleRevision
from trimtab.server.experiments.lifecycle import Action, Record, change, draft


def test_a_life_from_draft_to_archive_leaves_one_entry_for_each_change() -> None:
    record, entry = draft(experiment(), actor="ann", reason="new", at=NOON)
    trail = [entry]
    steps: list[Action] = ["start", "pause", "resume", "stop", "archive"]
    for n, action in enumerate(steps):
        record, entry = change(record, action, actor="bob", reason=f"step {n}", at=NOON + n * HOUR)
        trail.append(entry)
    assert record.state == "archived"
    assert [entry.revision for entry in trail] == [1, 2, 3, 4, 5, 6]
    assert all(later.before == earlier.after for earlier, later in pairwise(trail))
    assert (trail[-1].actor, trail[-1].reason) == ("bob", "step 4")


def test_only_coverage_changes_once_started() -> None:
    record = running(0.1)
    with pytest.raises(ExperimentState, match="immutable once started but for coverage"):
        change(record, "edit", actor="ann", reason="typo", at=NOON, definition=experiment(alpha=0.1))
    ramped, _ = change(record, "ramp", actor="ann", reason="fine so far", at=NOON, coverage=0.5)
    assert (ramped.coverage, ramped.definition) == (0.5, record.definition)


def test_every_pair_of_state_and_action_is_either_in_the_table_or_refused() -> None:
    ramp = [{"coverage": 0.1}, {"coverage": 1.0}]
    record, _ = draft(experiment(ramp=ramp), actor="a", reason="r", at=NOON)
    states: dict[str, Record] = {"draft": record}
    states["running"], _ = change(record, "start", actor="a", reason="r", at=NOON)
    states["paused"], _ = change(states["running"], "pause", actor="a", reason="r", at=NOON)
    states["stopped"], _ = change(states["running"], "stop", actor="a", reason="r", at=NOON)
    states["archived"], _ = change(states["stopped"], "archive", actor="a", reason="r", at=NOON)
    states["purged"], _ = change(states["archived"], "purge", actor="a", reason="r", at=NOON)
    allowed = set()
    for state, record in states.items():
        for action in get_args(Action):
            try:
                change(
                    record,
                    action,
                    actor="a",
                    reason="r",
                    at=NOON,
                    coverage=0.5 if action == "ramp" else None,
                    definition=record.definition if action == "edit" else None,
                )
            except ExperimentState:
                continue
            allowed.add((state, action))
    assert allowed == {
        *[("draft", a) for a in ("edit", "start", "archive")],
        *[("running", a) for a in ("ramp", "advance", "approve", "pause", "stop", "kill", "rollback")],
        *[("paused", a) for a in ("ramp", "approve", "resume", "stop", "kill", "rollback")],
        ("stopped", "archive"),
        ("archived", "purge"),
    }


def test_a_change_without_a_reason_is_refused() -> None:
    with pytest.raises(ExperimentState, match="needs a reason"):
        change(running(), "pause", actor="ann", reason=" ", at=NOON)


def test_a_stale_replica_cannot_change_what_it_has_not_read() -> None:
    record = running()
    with pytest.raises(StaleRevision, match="read it again"):
        change(record, "pause", actor="ann", reason="r", at=NOON, revision=record.revision - 1)


@pytest.mark.parametrize("coverage", [-0.1, 1.1, float("nan")])
def test_coverage_is_a_share(coverage: float) -> None:
    with pytest.raises(ExperimentState, match="share"):
        change(running(), "ramp", actor="ann", reason="r", at=NOON, coverage=coverage)


def test_a_clock_that_steps_back_keeps_the_trail_in_order() -> None:
    record = running()
    later, entry = change(record, "pause", actor="ann", reason="r", at=NOON - timedelta(days=400))
    assert entry.at == later.changed_at == NOON


def test_the_schedule_is_taken_step_by_step_and_left_by_a_ramp_by_hand() -> None:
    record, _ = draft(experiment(ramp=[{"coverage": 0.1}, {"coverage": 0.5}]), actor="a", reason="r", at=NOON)
    record, _ = change(record, "start", actor="a", reason="r", at=NOON, plans={"calm": "sha256:1"})
    assert (record.coverage, record.step, record.plans) == (0.1, 0, {"calm": "sha256:1"})
    approved, _ = change(record, "approve", actor="a", reason="r", at=NOON)
    assert (approved.approved, approved.coverage) == (1, 0.1)
    advanced, _ = change(approved, "advance", actor="server", reason="r", at=NOON + HOUR)
    assert (advanced.coverage, advanced.step, advanced.covered_since) == (0.5, 1, NOON + HOUR)
    by_hand, _ = change(record, "ramp", actor="a", reason="r", at=NOON, coverage=0.2)
    for last, why in ((advanced, "at its last step"), (by_hand, "left by a ramp by hand")):
        with pytest.raises(ExperimentState, match=why):
            change(last, "advance", actor="server", reason="r", at=NOON)


def test_a_kill_ends_requests_that_run_and_a_stop_does_not() -> None:
    ends = {
        action: change(running(), action, actor="a", reason="r", at=NOON)[0].ends_running
        for action in ("stop", "kill", "rollback")
    }
    assert ends == {"stop": False, "kill": True, "rollback": False}
