"""What an arm does to a request, and how the gates of the other arms are read where nothing is done."""

from typing import Any

import numpy as np
import pytest

from tests.bundles import random_bundle
from tests.server.experiments.examples import experiment
from trimtab.server.experiments.errors import ArmFailed
from trimtab.server.plan import compile_plan
from trimtab.server.service.admission import XARG, Admission, admit
from trimtab.server.service.arm import NOTHING, ArmRule, is_gated
from trimtab.server.steering import parse_steering

BUNDLES = {"calm": random_bundle()}


def edit(latent: int, watched: int | None, **more: Any) -> dict[str, Any]:
    gate = {} if watched is None else {"gate": {"latent": watched, "above": 0.5}}
    return {"bundle": "calm", "latent": latent, "operation": "add", "amount": 3.0, **gate, **more}


def arms(*steering: Any) -> list[dict[str, Any]]:
    weights = (0.5, 0.5) if len(steering) == 2 else (0.4, 0.4, 0.2)
    return [
        {"key": f"arm-{i}", "weight": weight} | ({} if one is None else {"steering": one})
        for i, (one, weight) in enumerate(zip(steering, weights, strict=True))
    ]


def rule(i: int, *steering: Any, **changes: Any) -> ArmRule:
    definition = experiment(arms=arms(*steering), **changes)
    plans = {arm.key: compile_plan(arm.steering, BUNDLES).hash for arm in definition.arms if arm.steering is not None}
    return ArmRule.of(definition, definition.arms[i], plans)


def admitted(of: ArmRule) -> Admission:
    return admit({"model": "m"}, fields={"model"}, models=("m",), bundles=BUNDLES, arm=of)


GATED = {"edits": [edit(7, 8)]}
OTHER = {"edits": [edit(8, 9, operation="clamp", amount=None, target=0.0)]}


def test_an_arm_without_gates_is_its_steering_and_a_control_is_nothing() -> None:
    plain = {"edits": [edit(7, None)]}
    treated = admitted(rule(1, None, plain)).steered
    assert treated is not None
    assert treated.plan == compile_plan(parse_steering(plain), BUNDLES)
    assert (treated.source, treated.bundles, treated.watches) == ("experiment", ("calm",), False)
    control = admitted(rule(0, None, plain))
    assert control.steered is None
    assert "vllm_xargs" not in control.body


def test_in_a_gated_experiment_every_arm_reads_the_same_gates_and_does_only_its_own() -> None:
    treatments = (None, GATED, OTHER)
    plans = []
    for i, own in enumerate(treatments):
        steered = admitted(rule(i, *treatments)).steered
        assert steered is not None
        assert steered.watches == (own is None)
        plans.append(steered.plan)
        done = [row for row in steered.plan.rows if max(abs(row.alpha), abs(row.beta)) > 1e-20]
        wanted = () if own is None else compile_plan(parse_steering(own), BUNDLES).rows
        assert done == list(wanted)
    gates = [{row.gate for row in plan.rows} for plan in plans]
    assert gates[0] == gates[1] == gates[2]
    assert len(gates[0]) == 2


def test_what_only_watches_adds_less_than_any_number_can_show() -> None:
    steered = admitted(rule(0, None, GATED)).steered
    assert steered is not None
    (row,) = steered.plan.rows
    moved = np.float32(row.alpha) * np.abs(BUNDLES["calm"].decoder[row.row]).astype(np.float32)
    assert row.alpha == pytest.approx(3.0 * NOTHING)
    assert (np.float32(1e-6) + moved == np.float32(1e-6)).all()


@pytest.mark.parametrize(
    ("steering", "gated"),
    [
        ((None, GATED), True),
        ((None, GATED, OTHER), True),
        ((None, {"edits": [edit(7, 8), edit(9, None)]}), False),
        ((None, GATED, {"bundle": "calm"}), False),
    ],
)
def test_an_experiment_is_gated_if_all_that_it_does_is(steering: Any, gated: bool) -> None:
    assert is_gated(experiment(arms=arms(*steering))) == gated


def test_a_prompt_only_arm_alters_always() -> None:
    prompt = {"key": "prompt", "weight": 0.5, "system_prompt": "Stay calm."}
    definition = experiment(arms=[{"key": "calm", "weight": 0.5, "steering": GATED}, prompt])
    assert not is_gated(definition)


def test_an_arm_that_means_something_else_than_at_the_start_fails() -> None:
    of = rule(1, None, GATED)
    with pytest.raises(ArmFailed, match="when the experiment was started"):
        admit(
            {"model": "m"},
            fields={"model"},
            models=("m",),
            bundles={"calm": random_bundle(seed=9)},
            arm=of,
        )


def test_a_control_whose_gates_cannot_be_read_fails_as_an_arm_would() -> None:
    for i in (0, 1):
        with pytest.raises(ArmFailed, match="is not loaded"):
            admit({"model": "m"}, fields={"model"}, models=("m",), bundles={}, arm=rule(i, None, GATED))


def test_the_plan_rides_where_plans_do() -> None:
    of = admitted(rule(0, None, GATED))
    assert of.steered is not None
    assert of.body["vllm_xargs"][XARG] == of.steered.plan.wire()
