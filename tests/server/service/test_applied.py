import copy
import math
from typing import Any

import pytest

from tests.bundles import random_bundle
from trimtab.server.errors import NotApplied
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.service.admission import Steered
from trimtab.server.service.applied import Run, applied, failed_open
from trimtab.server.steering import parse_steering

BUNDLES = {"calm": random_bundle(layer=1), "late": random_bundle(name="late", layer=2)}


def plan(*edits: tuple[str, str]) -> Plan:
    document = [
        {"bundle": bundle, "latent": 7, "operation": "add", "amount": 1.0, "scope": {"tokens": scope}}
        for bundle, scope in edits
    ]
    return compile_plan(parse_steering({"edits": document}), BUNDLES)


def steered(plan: Plan, *bundles: str) -> Steered:
    return Steered(plan, bundles, "closed")


def proof(of: Plan, samples: int = 1, /, **points: tuple[int, int, int, float]) -> dict[str, Any]:
    hook_points = {f"blocks.{name[1:]}.resid_post": point(*counts) for name, counts in points.items()}
    return {"plan": of.hash, "samples": samples, "failure": None, "hook_points": hook_points}


def point(prompt: int, completion: int, cached: int, norm: float, *, gate: int = 0, special: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cached_prompt_tokens": cached,
        "gate_firings": gate,
        "special_tokens": special,
        "max_relative_norm": norm,
        "mean_relative_norm": norm / 2,
    }


EVERYWHERE = plan(("calm", "all"))


def test_what_the_engine_proved_is_the_reply() -> None:
    steering = applied(steered(EVERYWHERE, "calm"), [Run(10, (5,), proof(EVERYWHERE, l1=(3, 5, 5, 0.25)))], 1)
    alone = point(3, 5, 5, 0.25)
    assert steering == {
        "status": "applied",
        "plan": EVERYWHERE.hash,
        "bundles": ["calm"],
        **alone,
        "hook_points": {"blocks.1.resid_post": alone},
    }


def test_samples_and_prompts_are_summed_and_norms_are_not() -> None:
    runs = [
        Run(10, (5, 2), proof(EVERYWHERE, 2, l1=(16, 7, 0, 0.5))),
        Run(4, (1,), proof(EVERYWHERE, l1=(0, 1, 2, 0.25))),
    ]
    steering = applied(steered(EVERYWHERE, "calm"), runs, 2)
    assert (steering["prompt_tokens"], steering["completion_tokens"], steering["cached_prompt_tokens"]) == (16, 8, 2)
    assert steering["max_relative_norm"] == 0.5
    assert steering["mean_relative_norm"] == pytest.approx((0.25 * 23 + 0.125 * 1) / 24)


def test_tokens_edited_at_two_hook_points_are_counted_once_for_the_request() -> None:
    both = plan(("calm", "completion"), ("late", "prompt"))
    steering = applied(
        steered(both, "calm", "late"), [Run(10, (5,), proof(both, l1=(0, 5, 0, 0.1), l2=(8, 0, 0, 0.2)))], 1
    )
    assert (steering["prompt_tokens"], steering["completion_tokens"]) == (8, 5)


def test_a_gate_that_never_opened_is_applied_and_shows() -> None:
    steering = applied(steered(EVERYWHERE, "calm"), [Run(10, (5,), proof(EVERYWHERE, l1=(8, 5, 0, 0.0)))], 1)
    assert (steering["status"], steering["completion_tokens"]) == ("applied", 5)
    assert (steering["gate_firings"], steering["max_relative_norm"], steering["mean_relative_norm"]) == (0, 0.0, 0.0)


def test_a_plan_that_does_nothing_is_applied_by_doing_nothing() -> None:
    nothing = compile_plan(parse_steering({"bundle": "calm", "strength": 0.0}), BUNDLES)
    steering = applied(steered(nothing, "calm"), [], 0)
    assert (steering["status"], steering["completion_tokens"], steering["hook_points"]) == ("applied", 0, {})


def broken(change: str) -> tuple[Run, int]:
    good = proof(EVERYWHERE, l1=(8, 5, 0, 0.1))
    found = good["hook_points"]["blocks.1.resid_post"]
    match change:
        case "no proof":
            return Run(10, (5,), None), 1
        case "another plan":
            good["plan"] = plan(("calm", "prompt")).hash
        case "a prompt token missed":
            found["prompt_tokens"] -= 1
        case "a completion token missed":
            found["completion_tokens"] -= 1
        case "a token too many":
            found["completion_tokens"] += 1
        case "a sample missed":
            return Run(10, (5, 5), good), 1
        case "a hook point missed":
            good["hook_points"] = {}
        case "a failure in the worker":
            good["failure"] = "no slot was free"
        case "a norm that is no number":
            found["max_relative_norm"] = math.nan
        case "a prompt that did not finish":
            return Run(10, (5,), good), 2
    return Run(10, (5,), good), 1


@pytest.mark.parametrize(
    "change",
    [
        "no proof",
        "another plan",
        "a prompt token missed",
        "a completion token missed",
        "a token too many",
        "a sample missed",
        "a hook point missed",
        "a failure in the worker",
        "a norm that is no number",
        "a prompt that did not finish",
    ],
)
def test_a_proof_that_differs_from_the_plan_is_never_applied(change: str) -> None:
    run, n_runs = broken(change)
    with pytest.raises(NotApplied):
        applied(steered(EVERYWHERE, "calm"), [run], n_runs)


def test_the_proof_that_the_breakages_start_from_is_whole() -> None:
    run, n_runs = broken("nothing")
    applied(steered(EVERYWHERE, "calm"), [copy.deepcopy(run)], n_runs)


def test_an_open_failure_says_why() -> None:
    steering = failed_open(steered(EVERYWHERE, "calm"), "the engine returned no proof")
    assert (steering["status"], steering["reason"]) == ("failed_open", "the engine returned no proof")
    assert "completion_tokens" not in steering
