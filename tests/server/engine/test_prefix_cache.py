"""The key of a cache block names the edits on its positions, and nothing else of the plan."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.bundles import random_bundle
from trimtab.server.engine.prefix_cache import extra_keys
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

CALM = random_bundle(name="calm")


def plan(scope: str, amount: float = 1.0) -> Plan:
    edit = {"bundle": "calm", "operation": "add", "latent": 7, "amount": amount, "scope": {"tokens": scope}}
    return compile_plan(parse_steering({"edits": [edit]}), {"calm": CALM})


def keys(wanted: Plan | None, n_prompt: int, *blocks: int, own: Any = None) -> list[Any]:
    """Keys of blocks of 32, by their first position."""
    params = SimpleNamespace(extra_args={"trimtab": wanted.wire()} if wanted else None)
    request = SimpleNamespace(sampling_params=params, num_prompt_tokens=n_prompt)
    return [extra_keys(lambda *_: (own, 0), request, start, start + 32, 0)[0] for start in blocks]


def test_an_unsteered_request_keeps_vllms_own_keys() -> None:
    assert keys(None, 50, 0, 32) == [None, None]
    assert keys(None, 50, 0, own=(("lora", "a", "b"),)) == [(("lora", "a", "b"),)]


def test_a_pooling_request_has_no_sampling_params() -> None:
    request = SimpleNamespace(sampling_params=None, num_prompt_tokens=5)
    assert extra_keys(lambda *_: (None, 3), request, 0, 32, 0) == (None, 3)


def test_blocks_before_the_first_edit_keep_the_plain_key() -> None:
    before, at, after = keys(plan("completion"), 65, 32, 64, 96)
    assert before is None
    assert at == after != None  # noqa: E711 - a chain of comparisons


def test_the_block_of_the_last_prompt_token_is_keyed() -> None:
    assert keys(plan("completion"), 64, 32) != [None]
    assert keys(plan("completion"), 65, 32) == [None]


def test_vllms_own_keys_come_first() -> None:
    (found,) = keys(plan("all"), 50, 32, own=(("lora", "a", "b"),))
    assert found[0] == ("lora", "a", "b")
    assert found[1][0] == "trimtab"


def test_a_prompt_scope_that_ends_inside_a_block_is_not_one_that_covers_it() -> None:
    assert keys(plan("prompt"), 40, 32) != keys(plan("prompt"), 90, 32)
    assert keys(plan("prompt"), 80, 32) == keys(plan("prompt"), 90, 32)


def test_all_scope_does_not_depend_on_the_length_of_the_prompt() -> None:
    assert keys(plan("all"), 40, 0, 32, 64) == keys(plan("all"), 90, 0, 32, 64)


def test_other_edits_are_other_keys() -> None:
    assert keys(plan("all"), 40, 0) != keys(plan("all", 2.0), 40, 0)


@pytest.mark.parametrize("scope", ["prompt", "completion", "all"])
def test_keys_can_be_published_as_events(scope: str) -> None:
    """vLLM publishes `key[1]` of each key."""
    for found in keys(plan(scope), 40, 0, 32, 64):
        assert found is None or all(len(key) == 2 for key in found)
