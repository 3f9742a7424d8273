"""Who gets which arm: the same everywhere, and unmoved by a ramp."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.server.experiments.examples import NOON, running
from trimtab.server.experiments.assignment import MAX_UNIT, REASONS, assign, shares
from trimtab.server.experiments.lifecycle import change

VECTORS = json.loads((Path(__file__).parent / "assignment_vectors.json").read_text())


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_the_published_vectors_hold(case: dict[str, Any]) -> None:
    record = running(case["coverage"], **case["experiment"])
    for unit, (reason, arm, bucket) in case["units"].items():
        given = assign(record, {record.definition.unit: unit}, holdout=case["holdout"])
        assert (given.reason, given.arm and given.arm.key, given.bucket) == (reason, arm, bucket), unit


def test_a_ramp_only_adds_units_and_moves_none() -> None:
    units = [f"user-{n}" for n in range(3000)]
    arms: dict[str, str] = {}
    for coverage in (0.01, 0.1, 0.5, 1.0):
        record = running(coverage)
        now = {unit: arm.key for unit in units if (arm := assign(record, {"user": unit}).arm)}
        assert arms.items() <= now.items()
        arms = now
    assert len(arms) == len(units)


def test_the_split_is_the_shares_of_whole_buckets() -> None:
    record = running(0.25)
    counts = Counter(given.key for n in range(8000) if (given := assign(record, {"user": f"u{n}"}).arm))
    total = sum(counts.values())
    assert total == pytest.approx(2000, abs=160)
    expected = dict(zip(["control", "calm", "prompt"], shares(record.definition, 0.25), strict=True))
    for arm, share in expected.items():
        assert counts[arm] / total == pytest.approx(share, abs=4 * (share * (1 - share) / total) ** 0.5)


def test_shares_count_whole_buckets_where_a_small_coverage_cuts_one() -> None:
    arms = [{"key": "a", "weight": 0.3333}, {"key": "b", "weight": 0.6667, "steering": {"bundle": "calm"}}]
    given = shares(running(arms=arms).definition, 0.01)
    assert given == (34 / 101, 67 / 101)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, "missing_unit"),
        ({"user": None}, "missing_unit"),
        ({"user": ""}, "missing_unit"),
        ({"user": 7}, "malformed_unit"),
        ({"user": "\0\0\0"}, "malformed_unit"),
        ({"user": "u" * (MAX_UNIT + 1)}, "malformed_unit"),
        ({"user": "u" * 1_000_000}, "malformed_unit"),
        ({"user": "u", "tenant": "other"}, "targeting"),
        ({"user": "u"}, "targeting"),
        ({"user": "u", "tenant": "acme"}, "assigned"),
    ],
)
def test_a_unit_that_does_not_take_part_is_told_why(attributes: dict[str, Any], reason: str) -> None:
    given = assign(running(targeting={"tenant": "acme"}), attributes)
    assert given.reason == reason
    assert given.reason in REASONS
    assert (given.arm is None) == (reason != "assigned")


def test_a_paused_or_stopped_experiment_enrols_nobody() -> None:
    for action in ("pause", "stop"):
        record, _ = change(running(), action, actor="ann", reason="r", at=NOON)
        assert assign(record, {"user": "u"}).reason == "not_running"
        assert assign(record, {"user": "u"}, forced="calm").arm is None


def test_a_forced_arm_is_given_and_left_out_of_the_analysis() -> None:
    given = assign(running(0.0), {"user": "u"}, forced="calm")
    assert given.arm is not None
    assert given.arm.key == "calm"
    assert not given.analysed
    assert assign(running(), {"user": "u"}, forced="cool").arm is None


def test_disjoint_slices_of_a_layer_never_share_a_unit() -> None:
    left = running(key="left", layer={"key": "tone", "start": 0.0, "end": 0.5})
    right = running(key="right", layer={"key": "tone", "start": 0.5, "end": 1.0})
    for n in range(2000):
        took = [assign(record, {"user": f"u{n}"}).arm is not None for record in (left, right)]
        assert sum(took) == 1


def test_the_holdout_stays_out_of_every_experiment_but_those_that_ignore_it() -> None:
    units = [f"u{n}" for n in range(2000)]
    both = [running(key=key) for key in ("one", "two")]
    out = [{u for u in units if assign(record, {"user": u}, holdout=0.1).arm is None} for record in both]
    assert out[0] == out[1]
    assert len(out[0]) == pytest.approx(200, abs=60)
    ignores = running(respects_holdout=False)
    assert all(assign(ignores, {"user": u}, holdout=0.1).arm for u in out[0])


def test_arms_of_two_experiments_are_independent() -> None:
    both = [running(key=key) for key in ("one", "two")]
    pairs = Counter(
        tuple(arm.key for record in both if (arm := assign(record, {"user": f"u{n}"}).arm)) for n in range(4000)
    )
    assert pairs["calm", "calm"] == pytest.approx(4000 * 0.16, abs=4 * (4000 * 0.16 * 0.84) ** 0.5)


def test_another_process_with_another_hash_seed_assigns_the_same() -> None:
    code = (
        "from tests.server.experiments.examples import running\n"
        "from trimtab.server.experiments.assignment import assign\n"
        "r = running(0.5)\n"
        "arms = [assign(r, {'user': f'u{n}'}).arm for n in range(1000)]\n"
        "__import__('sys').stdout.write(' '.join(arm.key if arm else '-' for arm in arms))"
    )
    root = Path(__file__).parents[3]
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
    )
    record = running(0.5)
    here = [assign(record, {"user": f"u{n}"}).arm for n in range(1000)]
    assert there.stdout.decode().split() == [arm.key if arm else "-" for arm in here]
