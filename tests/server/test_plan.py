"""A plan is canonical: the same edits spelt differently are one plan, and every wrong plan is refused with a clear message."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bundles import LATENTS, random_bundle
from trimtab.server.errors import InvalidSteering, UnknownBundle
from trimtab.server.plan import Plan, PlanRow, Segment, Window, block_key, compile_plan
from trimtab.server.steering import MAX_EDITS, MAX_STRENGTH, parse_steering

CALM, KIND = random_bundle(name="calm", layer=1), random_bundle(name="kind", layer=2, seed=1)
BUNDLES = {"calm": CALM, "kind": KIND}


def compiled(*edits: dict[str, Any], **steering: Any) -> Plan:
    return compile_plan(parse_steering({"edits": list(edits), **steering}), BUNDLES)


def edit(operation: str = "add", **fields: Any) -> dict[str, Any]:
    value = {"add": {"amount": 2.0}, "clamp": {"target": 2.0}, "scale": {"factor": 2.0}}.get(operation, {})
    target = {} if "vector" in fields else {"latent": 7}
    return {"bundle": "calm", "operation": operation} | target | value | fields


def messages(steering: Any) -> dict[str, str]:
    with pytest.raises(InvalidSteering) as caught:
        compile_plan(parse_steering(steering), BUNDLES)
    return {v.field: v.message for v in caught.value.violations}


finite = st.floats(-1e6, 1e6, allow_nan=False)
scopes = st.fixed_dictionaries(
    {"tokens": st.sampled_from(["prompt", "completion", "all"]), "first_token": st.booleans()}
)


@st.composite
def edits(draw: st.DrawFn) -> dict[str, Any]:
    operation = draw(st.sampled_from(["add", "ablate", "clamp", "scale", "project"]))
    found: dict[str, Any] = {
        "bundle": draw(st.sampled_from(["calm", "kind"])),
        "operation": operation,
        "latent": draw(st.sampled_from(LATENTS)),
        "strength": draw(st.floats(-MAX_STRENGTH, MAX_STRENGTH)),
        "scope": draw(scopes),
    }
    value = {"add": "amount", "clamp": "target", "scale": "factor"}.get(operation)
    if value:
        found[value] = draw(finite)
    return found


many_edits = st.lists(edits(), min_size=1, max_size=6, unique_by=lambda e: (e["bundle"], e["latent"]))


@given(many_edits)
def test_the_wire_round_trips(found: list[dict[str, Any]]) -> None:
    plan = compiled(*found)
    assert Plan.from_wire(plan.wire()) == plan
    json.loads(plan.wire(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@given(many_edits, st.randoms())
def test_the_order_of_edits_does_not_matter(found: list[dict[str, Any]], random: Any) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    assert compiled(*shuffled) == compiled(*found)


@given(many_edits, st.integers(1, 40), st.integers(0, 50))
def test_segments_hold_at_each_position_the_rows_whose_windows_hold_it(
    found: list[dict[str, Any]], n_prompt: int, position: int
) -> None:
    plan = compiled(*found)
    here = [s for s in plan.segments(n_prompt) if s.lo <= position and (s.hi is None or position < s.hi)]
    assert len(here) <= 1
    wanted = []
    for row in plan.rows:
        lo, hi = row.window.bounds(n_prompt)
        if lo <= position and (hi is None or position < hi):
            wanted.append((row.layer, *row[2:]))
    assert sorted((row.layer, *row[2:]) for s in here for row in s.rows) == sorted(wanted)


@given(many_edits, st.integers(1, 100))
def test_segments_are_disjoint_and_ascending(found: list[dict[str, Any]], n_prompt: int) -> None:
    segments = compiled(*found).segments(n_prompt)
    assert len(segments) <= 3
    for a, b in pairwise(segments):
        assert a.lo < (a.hi or math.inf) <= b.lo


@given(st.integers(1, 300))
def test_prompt_and_completion_part_the_positions(n_prompt: int) -> None:
    prompt, completion, both = (Window(t, False).bounds(n_prompt) for t in ("prompt", "completion", "all"))
    assert both == (1, None)
    assert completion[1] is None
    assert prompt[0] == 1
    assert prompt[1] == completion[0] == max(1, n_prompt - 1)


def test_position_zero_is_edited_only_when_asked() -> None:
    assert Window("prompt", True).bounds(5) == (0, 4)
    assert Window("all", True).bounds(5) == (0, None)
    assert Window("completion", True).bounds(1) == (0, None)
    assert Window("completion", False).bounds(1) == (1, None)


@pytest.mark.parametrize(
    "other",
    [
        [edit(amount=4.0, strength=0.5)],
        [edit(strength=1.0)],
        [edit(scope={"tokens": "all"})],
        [edit(scope={"tokens": "all", "first_token": False})],
        [edit(amount=0.2, unit="max_act")],
        [edit(), edit("ablate", latent=8, strength=0.0)],
    ],
)
def test_the_same_edits_spelt_differently_are_one_plan(other: list[dict[str, Any]]) -> None:
    assert compiled(*other).hash == compiled(edit()).hash


@pytest.mark.parametrize(
    "other",
    [
        edit(amount=2.1),
        edit(strength=-1.0),
        edit(latent=8),
        edit(bundle="kind"),
        edit("clamp"),
        edit(scope={"tokens": "prompt"}),
        edit(scope={"first_token": True}),
    ],
)
def test_different_edits_are_different_plans(other: dict[str, Any]) -> None:
    assert compiled(other).hash != compiled(edit()).hash


def test_strength_zero_is_the_empty_plan() -> None:
    assert compiled(edit(), edit("ablate", latent=8), strength=0.0) == Plan.of([])
    assert compiled(edit(strength=0.0)).rows == ()


def test_the_empty_plan_has_no_segments() -> None:
    """`segments` of a plan without rows once raised, which in the scheduler ends the engine."""
    assert Plan.of([]).segments(7) == ()


def test_scale_by_one_is_the_empty_plan() -> None:
    assert compiled(edit("scale", factor=1.0)).rows == ()


def test_the_hash_is_the_same_in_every_release() -> None:
    """Hashes are quoted in replies and logs, and compared between servers: a change of this value is a change of format."""
    row = PlanRow(14, Window("all", False), "sha256:b", "latent", 3, 1.5, -1.0)
    assert Plan.of([row]).hash == "sha256:1ee650903e6a48f6079eae30257b6d3c"


def test_a_bundle_alone_means_its_recommended_edits() -> None:
    recommended = compile_plan(parse_steering({"bundle": "calm", "strength": 0.5}), BUNDLES)
    spelt = compiled(edit(amount=30.0), edit("ablate", latent=8, scope={"tokens": "completion"}), strength=0.5)
    assert recommended == spelt


def test_units_turn_into_sae_units() -> None:
    assert compiled(edit(amount=0.3, unit="max_act")).rows[0].alpha == pytest.approx(3.0)
    assert compiled(edit(amount=0.3, unit="resid_norm")).rows[0].alpha == pytest.approx(15.0, rel=1e-5)


def test_coefficients_of_each_operation() -> None:
    found = {op: compiled(edit(op)).rows for op in ("add", "ablate", "clamp", "scale")}
    assert {op: (rows[0].alpha, rows[0].beta) for op, rows in found.items()} == {
        "add": (2.0, 0.0),
        "ablate": (0.0, -1.0),
        "clamp": (2.0, -1.0),
        "scale": (0.0, 1.0),
    }


@pytest.mark.parametrize(
    ("steering", "field"),
    [
        ({}, "steering"),
        ({"bundle": "calm", "edits": [edit()]}, "steering"),
        ({"bundle": "calm", "strenght": 1.0}, "steering.strenght"),
        ({"bundle": "calm", "strength": math.nan}, "steering.strength"),
        ({"bundle": "calm", "strength": math.inf}, "steering.strength"),
        ({"bundle": "calm", "strength": "1"}, "steering.strength"),
        ({"bundle": "calm", "strength": MAX_STRENGTH * 1.01}, "steering.strength"),
        ({"edits": []}, "steering"),
        ({"edits": [edit()] * (MAX_EDITS + 1)}, "steering.edits"),
        ({"edits": [edit(amount=math.nan)]}, "steering.edits[0].amount"),
        ({"edits": [edit(), edit(latent=-1)]}, "steering.edits[1].latent"),
        ({"edits": [edit(latent=7.0)]}, "steering.edits[0].latent"),
        ({"edits": [edit(latent=10)]}, "steering.edits[0].latent"),
        ({"edits": [edit(vector="nope")]}, "steering.edits[0].vector"),
        ({"edits": [edit(operation="multiply")]}, "steering.edits[0].operation"),
        ({"edits": [edit("ablate", amount=1.0)]}, "steering.edits[0]"),
        ({"edits": [edit("clamp", unit="max_act", target=None)]}, "steering.edits[0]"),
        ({"edits": [edit(scope={"tokens": "everything"})]}, "steering.edits[0].scope.tokens"),
        ({"edits": [edit("ablate"), edit("clamp")]}, "steering.edits[1]"),
        ("calm", "steering"),
        (None, "steering"),
    ],
)
def test_wrong_steering_is_refused_with_the_path_of_the_field(steering: Any, field: str) -> None:
    assert field in messages(steering)


def test_every_violation_is_told_at_once() -> None:
    assert len(messages({"edits": [edit(amount="much"), edit(latent=-1)], "strenght": 1.0})) == 3


def test_an_unknown_bundle_names_what_is_loaded() -> None:
    with pytest.raises(UnknownBundle, match="calm, kind"):
        compiled(edit(bundle="clam"))


@given(st.text() | st.binary().map(repr))
def test_no_text_that_is_not_a_plan_becomes_one(text: str) -> None:
    with pytest.raises(InvalidSteering):
        Plan.from_wire(text)


def test_a_tampered_wire_is_refused() -> None:
    with pytest.raises(InvalidSteering, match="hash"):
        Plan.from_wire(compiled(edit()).wire().replace("2.0", "3.0"))


def test_equal_rows_share_a_segment_key_whatever_their_windows() -> None:
    keys = {
        s.key
        for tokens in ("prompt", "completion", "all")
        for s in compiled(edit(scope={"tokens": tokens})).segments(9)
    }
    assert len(keys) == 1


def test_a_block_is_keyed_by_the_edits_on_its_own_positions() -> None:
    segments = (Segment(1, 40, (), "a"), Segment(40, None, (), "b"))
    assert block_key(segments, 0, 32) == ((1, 32, "a"),)
    assert block_key(segments, 32, 64) == ((0, 8, "a"), (8, 32, "b"))
    assert block_key(segments, 64, 96) == ((0, 32, "b"),)
    assert block_key(segments[1:], 0, 32) == ()
