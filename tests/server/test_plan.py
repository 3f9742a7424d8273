"""A plan is canonical: the same edits spelt differently are one plan, and every wrong plan is refused with a clear message."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bundles import random_bundle
from tests.parity.strategies import edits, steerings
from trimtab.server.errors import InvalidSteering, UnknownBundle
from trimtab.server.plan import Gate, Plan, PlanRow, Segment, Window, block_key, compile_plan
from trimtab.server.steering import MAX_EDITS, MAX_STRENGTH, parse_steering
from trimtab.server.window import EVERYWHERE

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


many_edits = st.lists(
    edits(BUNDLES), min_size=1, max_size=6, unique_by=lambda e: (e["bundle"], e.get("latent"), e.get("vector"))
)


@given(steerings(BUNDLES, conditional=True))
def test_what_the_strategies_draw_is_valid(steering: dict[str, Any]) -> None:
    compile_plan(parse_steering(steering), BUNDLES)


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
    wanted = [row for row in plan.rows if holds(row.window, n_prompt, position)]
    got = [row for s in here for row in s.rows]
    assert {place(row) for row in got} == {place(row) for row in wanted}
    assert math.fsum(row.alpha for row in got) == pytest.approx(math.fsum(row.alpha for row in wanted))


def holds(window: Window, n_prompt: int, position: int) -> bool:
    lo, hi = window.bounds(n_prompt)
    return lo <= position and (hi is None or position < hi)


def place(row: PlanRow) -> PlanRow:
    """What a row edits, and when."""
    return row._replace(window=EVERYWHERE, alpha=0.0, beta=0.0)


@given(many_edits, st.integers(1, 100))
def test_segments_are_disjoint_and_ascending(found: list[dict[str, Any]], n_prompt: int) -> None:
    for a, b in pairwise(compiled(*found).segments(n_prompt)):
        assert a.lo < (a.hi or math.inf) <= b.lo


@pytest.mark.parametrize(
    "other",
    [
        [edit(amount=4.0, strength=0.5)],
        [edit(strength=1.0)],
        [edit(scope={"tokens": "all"})],
        [edit(scope={"tokens": "all", "first_token": False})],
        [edit(amount=0.2, unit="max_act")],
        [edit(), edit("ablate", latent=8, strength=0.0)],
        [edit(gate=None)],
        [edit(scope={"exclude_special": False, "window": None})],
        [edit(scope={"window": {}})],
        [edit(scope={"window": {"origin": "start", "start": 0}})],
        [edit(scope={"window": {"origin": "start", "start": 1}})],
        [edit(amount=0.5), edit(amount=1.5)],
        [edit(), edit(amount=0.0), edit(amount=-0.0, latent=8)],
        [edit(amount=1.0, scope={"tokens": "all"}), edit(amount=0.1, unit="max_act")],
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
        edit(scope={"exclude_special": True}),
        edit(scope={"window": {"start": 2}}),
        edit(scope={"window": {"stop": 200}}),
        edit(scope={"window": {"origin": "prompt_end", "stop": 0}}),
        edit(gate={"latent": 8, "above": 1.0}),
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
    window, gate = Window(1, -1, None, None), Gate("sha256:b", 2, 0.5, "onward")
    row = PlanRow(14, window, "sha256:b", "latent", 3, 1.5, -1.0, True, gate)
    assert Plan.of([row]).hash == "sha256:730c51dc415a7b5ddddb39ce99a76642"


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
        ({"edits": [edit(scope={"window": {"start": 5, "stop": 5}})]}, "steering.edits[0].scope.window"),
        ({"edits": [edit(scope={"window": {"start": -1}})]}, "steering.edits[0].scope.window"),
        ({"edits": [edit(scope={"window": {"origin": "completion", "stop": -1}})]}, "steering.edits[0].scope.window"),
        ({"edits": [edit(scope={"window": {"origin": "end"}})]}, "steering.edits[0].scope.window.origin"),
        ({"edits": [edit(scope={"window": {"start": 1.5}})]}, "steering.edits[0].scope.window.start"),
        ({"edits": [edit(scope={"window": {"stop": 2**31}})]}, "steering.edits[0].scope.window.stop"),
        ({"edits": [edit(scope={"window": {"stop": 1}})]}, "steering.edits[0].scope"),
        (
            {"edits": [edit(scope={"tokens": "prompt", "window": {"origin": "completion"}})]},
            "steering.edits[0].scope",
        ),
        ({"edits": [edit(gate={"latent": 8})]}, "steering.edits[0].gate.above"),
        ({"edits": [edit(gate={"latent": 8, "above": -1.0})]}, "steering.edits[0].gate.above"),
        ({"edits": [edit(gate={"latent": 8, "above": math.inf})]}, "steering.edits[0].gate.above"),
        ({"edits": [edit(gate={"latent": 10, "above": 1.0})]}, "steering.edits[0].gate.latent"),
        ({"edits": [edit(gate={"latent": 8, "above": 1.0, "bundle": "kind"})]}, "steering.edits[0].gate.bundle"),
        ({"edits": [edit(gate={"latent": 8, "above": 1.0, "mode": "always"})]}, "steering.edits[0].gate.mode"),
        ({"edits": [edit(amount=1e300, strength=100.0)]}, "steering.edits[0]"),
        ("calm", "steering"),
        (None, "steering"),
    ],
)
def test_wrong_steering_is_refused_with_the_path_of_the_field(steering: Any, field: str) -> None:
    assert field in messages(steering)


def test_operations_on_one_latent_may_take_turns() -> None:
    turns = [
        edit("ablate", scope={"tokens": "prompt"}),
        edit("clamp", scope={"window": {"origin": "completion", "stop": 4}}),
        edit("scale", scope={"window": {"origin": "completion", "start": 4}}),
    ]
    assert len(compiled(*turns).rows) == 3


def test_windows_of_different_origins_that_may_meet_are_refused_with_a_prompt_in_which_they_do() -> None:
    early, late = {"window": {"stop": 8}}, {"window": {"origin": "prompt_end", "start": -3}}
    found = messages({"edits": [edit("ablate", scope=early), edit("clamp", scope=late)]})
    assert (
        "edits[0] already edits 7 on the same tokens (in a prompt of length 1, for one)" in found["steering.edits[1]"]
    )


def test_an_add_beside_another_operation_is_the_sum_of_the_two() -> None:
    (row,) = compiled(edit("clamp", target=3.0), edit("add", amount=0.5)).rows
    assert (row.alpha, row.beta) == (3.5, -1.0)


def test_a_gate_names_its_latent_in_its_own_units() -> None:
    gates = [
        compiled(edit(gate={"latent": 8, "above": 0.3, "unit": "max_act"})).rows[0].gate,
        compiled(edit(gate={"latent": 8, "above": 3.0, "bundle": "calm", "mode": "token"})).rows[0].gate,
    ]
    assert gates == [Gate(CALM.content_hash, 1, 3.0, "token")] * 2


def test_a_gate_below_its_latents_threshold_opens_wherever_that_fires() -> None:
    jump = random_bundle(name="jump", layer=1)
    jump.threshold[:] = 2.0
    plans = [
        compile_plan(parse_steering({"edits": [edit(bundle="jump", gate={"latent": 8, "above": x})]}), {"jump": jump})
        for x in (0.0, -0.0, 1.0, 2.0, 2.5)
    ]
    assert len({plan.hash for plan in plans[:4]}) == 1
    assert plans[4] != plans[0]


def test_a_gate_at_another_layer_says_which() -> None:
    found = messages({"edits": [edit(gate={"latent": 8, "above": 1.0, "bundle": "kind"})]})
    assert "reads layer 2 and the edit is at layer 1" in found["steering.edits[0].gate.bundle"]


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


def test_a_wire_that_says_the_same_in_other_words_is_refused() -> None:
    wire = compiled(edit()).wire()
    for other in (
        wire.replace(",", ", "),
        wire + " ",
        json.dumps(json.loads(wire) | {"more": 1}, separators=(",", ":")),
    ):
        with pytest.raises(InvalidSteering, match="hash"):
            Plan.from_wire(other)


def test_equal_rows_share_a_segment_key_whatever_their_windows() -> None:
    keys = {
        s.key
        for tokens in ("prompt", "completion", "all")
        for s in compiled(edit(scope={"tokens": tokens})).segments(9)
    }
    assert len(keys) == 1


def test_rows_gated_onward_keep_the_window_that_their_gate_watches() -> None:
    def keys(mode: str) -> set[str]:
        gate = {"latent": 8, "above": 1.0, "mode": mode}
        return {
            s.key
            for tokens in ("prompt", "completion")
            for s in compiled(edit(scope={"tokens": tokens}, gate=gate)).segments(9)
        }

    assert (len(keys("token")), len(keys("onward"))) == (1, 2)


@st.composite
def respelt(draw: st.DrawFn, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The same edit in other words."""
    again = {**found, "scope": dict(found.get("scope", {}))}
    scope = again["scope"]
    again["bundle"] = found["bundle"]
    if draw(st.booleans()):
        again.setdefault("strength", 1.0)
        again.setdefault("unit", "raw")
        again.setdefault("gate", None)
        scope.setdefault("tokens", "all")
        scope.setdefault("exclude_special", False)
    window = scope.get("window")
    if draw(st.booleans()) and window is None and scope.get("tokens", "all") == "completion":
        scope |= {"tokens": "all", "window": {"origin": "completion"}}
    elif draw(st.booleans()) and window is not None and window["origin"] == "completion":
        start, stop = window.get("start", 0), window.get("stop")
        scope["window"] = {"origin": "prompt_end", "start": start - 1, "stop": None if stop is None else stop - 1}
    elif draw(st.booleans()) and window is None:
        scope["window"] = {"origin": "start", "start": 0}
    if found["operation"] == "add":
        match draw(st.sampled_from(["as it is", "two halves", "amount to strength"])):
            case "two halves":
                return [{**again, "amount": found["amount"] / 2}] * 2
            case "amount to strength":  # powers of two are exact
                again |= {"amount": found["amount"] * 2, "strength": found.get("strength", 1.0) / 2}
    return [again]
    return [again]


@given(many_edits, st.data())
def test_any_other_spelling_of_the_same_edits_is_the_same_plan(
    found: list[dict[str, Any]], data: st.DataObject
) -> None:
    again = [other for edit in data.draw(st.permutations(found)) for other in data.draw(respelt(edit))]
    assert compiled(*again).hash == compiled(*found).hash


@given(edits(BUNDLES), edits(BUNDLES))
def test_edits_that_differ_anywhere_are_different_plans(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Compared by what they do to prompts of every length up to 120 tokens."""
    one, two = compiled(a), compiled(b)

    def effect(plan: Plan) -> list[Any]:
        found: list[Any] = [(place(row), row.alpha, row.beta) for row in plan.rows]
        for n in range(1, 121):
            bounds = [row.window.bounds(n) for row in plan.rows]
            found += [(lo, hi) if hi is None or lo < hi else None for lo, hi in bounds]
        return found

    assert (one.hash == two.hash) == (effect(one) == effect(two))


def test_a_block_is_keyed_by_the_edits_on_its_own_positions() -> None:
    segments = (Segment(1, 40, (), "a"), Segment(40, None, (), "b"))
    assert block_key(segments, 0, 32) == ((1, 32, "a"),)
    assert block_key(segments, 32, 64) == ((0, 8, "a"), (8, 32, "b"))
    assert block_key(segments, 64, 96) == ((0, 32, "b"),)
    assert block_key(segments[1:], 0, 32) == ()
