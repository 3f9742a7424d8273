"""The key of a cache block names the edits on its positions, and nothing else of the plan."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.bundles import random_bundle
from trimtab.server.engine import prefix_cache
from trimtab.server.engine.prefix_cache import extra_keys
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

CALM = random_bundle(name="calm")


def plan(scope: str, amount: float = 1.0) -> Plan:
    edit = {"bundle": "calm", "operation": "add", "latent": 7, "amount": amount, "scope": {"tokens": scope}}
    return compile_plan(parse_steering({"edits": [edit]}), {"calm": CALM})


def gated(mode: str, **scope: Any) -> Plan:
    edit = {"bundle": "calm", "operation": "ablate", "latent": 7, "scope": scope}
    gate = {"latent": 8, "above": 0.5, "mode": mode}
    return compile_plan(parse_steering({"edits": [edit | {"gate": gate}]}), {"calm": CALM})


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


def test_an_edit_of_the_last_layer_is_in_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    late = random_bundle(name="late", layer=2)
    edits = [
        {"bundle": name, "operation": "ablate", "latent": 7, "scope": {"window": {"stop": stop}}}
        for name, stop in (("calm", 40), ("late", 90))
    ]
    both = compile_plan(parse_steering({"edits": edits}), {"calm": CALM, "late": late})
    without = compile_plan(parse_steering({"edits": edits[:1]}), {"calm": CALM, "late": late})
    assert keys(both, 90, 0, 32, 64) != keys(without, 90, 0, 32, 64)
    monkeypatch.setattr(prefix_cache, "last_layers", {2})
    assert keys(both, 90, 0, 32, 64) == keys(without, 90, 0, 32, 64)
    assert keys(both, 90, 64) == [None]


def test_two_models_in_one_process_key_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "last_layers", {1, 2})
    assert keys(plan("all"), 40, 0) != [None]


def test_a_window_is_keyed_where_it_lies() -> None:
    edit = {"bundle": "calm", "operation": "ablate", "latent": 7}

    def window(**fields: Any) -> Plan:
        return compile_plan(parse_steering({"edits": [edit | {"scope": {"window": fields}}]}), {"calm": CALM})

    before, within, after = keys(window(start=40, stop=50), 90, 0, 32, 64)
    assert (before, after) == (None, None)
    assert within == keys(window(origin="prompt_end", start=-50, stop=-40), 90, 32)[0]
    assert within != keys(window(start=41, stop=50), 90, 32)[0]
    assert within != keys(window(start=40, stop=51), 90, 32)[0]


def test_a_gate_by_token_is_shared_and_one_that_stays_open_is_not() -> None:
    assert keys(gated("token"), 90, 0, 32) == keys(gated("token"), 90, 0, 32)
    assert keys(gated("token"), 90, 0) != keys(plan("all"), 90, 0)
    assert keys(gated("onward"), 90, 0) != keys(gated("onward"), 90, 0)


def test_blocks_before_a_gate_that_stays_open_are_shared() -> None:
    before, at = keys(gated("onward", tokens="completion"), 65, 32, 64)
    assert before is None
    assert at is not None


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    params = SimpleNamespace(extra_args={"trimtab": gated("onward").wire()})
    request = SimpleNamespace(sampling_params=params, num_prompt_tokens=90)
    first, again = (extra_keys(lambda *_: (None, 0), request, 0, 32, 0)[0] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("scope", ["prompt", "completion", "all"])
def test_keys_can_be_published_as_events(scope: str) -> None:
    """vLLM publishes `key[1]` of each key."""
    for found in (*keys(plan(scope), 40, 0, 32, 64), *keys(gated("onward", tokens=scope), 40, 0, 32, 64)):
        assert found is None or all(len(key) == 2 for key in found)
