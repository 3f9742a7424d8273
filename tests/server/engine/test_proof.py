"""A proof that does not show the whole plan applied is no proof."""

import math
from typing import Any

import pytest

from tests.bundles import random_bundle
from trimtab.server.engine.proof import expected, merge, verify
from trimtab.server.errors import NotApplied
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

POINT = "blocks.1.resid_post"
EDIT = {"bundle": "calm", "operation": "add", "latent": 7, "amount": 1.0}
CALM = random_bundle(name="calm")


def plan(scope: str = "all") -> Plan:
    return compile_plan(parse_steering({"edits": [EDIT | {"scope": {"tokens": scope}}]}), {"calm": CALM})


def proof(prompt: int = 3, completion: int = 4, cached: int = 0, **changes: Any) -> dict[str, Any]:
    point = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cached_prompt_tokens": cached,
        "gate_firings": 2,
        "special_tokens": 1,
        "max_relative_norm": 0.5,
        "mean_relative_norm": 0.25,
    }
    return {"plan": plan().hash, "samples": 1, "failure": None, "hook_points": {POINT: point}} | changes


@pytest.mark.parametrize(("scope", "counts"), [("all", (3, 4)), ("prompt", (3, 0)), ("completion", (0, 4))])
def test_expected_counts(scope: str, counts: tuple[int, int]) -> None:
    assert expected(plan(scope), 5, 4) == {POINT: counts}


def test_one_prompt_token_is_the_sink_and_is_left_alone() -> None:
    assert expected(plan(), 1, 4) == {POINT: (0, 3)}


def test_a_whole_proof_passes() -> None:
    verify(plan(), proof(), 5, [4])
    verify(plan(), proof(prompt=1, cached=2), 5, [4])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "no proof"),
        (proof(prompt=2), "edited 2 prompt"),
        (proof(completion=3), "3 completion"),
        (proof(cached=1), "edited 4 prompt"),
        (proof(plan="sha256:other"), "sha256:other"),
        (proof(failure="the sky fell"), "the sky fell"),
        (proof(samples=2), "2 samples of 1"),
        (proof(hook_points={}), "edited 0 prompt"),
    ],
)
def test_anything_less_is_refused(found: Any, message: str) -> None:
    with pytest.raises(NotApplied, match=message):
        verify(plan(), found, 5, [4])


def test_samples_are_summed_and_norms_maximised() -> None:
    first, second = proof(completion=4), proof(completion=2)
    second["hook_points"][POINT] |= {"max_relative_norm": 0.75, "mean_relative_norm": 0.5}
    merged = merge([first, second])
    assert merged["samples"] == 2
    assert merged["hook_points"][POINT] == {
        "prompt_tokens": 6,
        "completion_tokens": 6,
        "cached_prompt_tokens": 0,
        "gate_firings": 4,
        "special_tokens": 2,
        "max_relative_norm": 0.75,
        "mean_relative_norm": (0.25 * 7 + 0.5 * 5) / 12,
    }
    verify(plan(), merged, 5, [4, 2])
    assert math.isclose(first["hook_points"][POINT]["max_relative_norm"], 0.5)


def test_one_failed_sample_fails_the_request() -> None:
    with pytest.raises(NotApplied, match="the sky fell"):
        verify(plan(), merge([proof(), proof(failure="the sky fell")]), 5, [4, 4])
