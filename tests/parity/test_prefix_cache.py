"""Blocks are shared exactly where the same edits touched the same positions; every warm answer equals its cold one."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.parity.cases import PROMPTS, edit, gate, window
from tests.parity.engine import ENGINE, Answer, Engine
from tests.parity.rows import bundles
from trimtab.server.engine import proof
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

pytestmark = pytest.mark.filterwarnings("ignore")
BLOCK = ENGINE["block_size"]
LONG = PROMPTS["long"]


def plan(*edits: dict[str, object]) -> Plan:
    return compile_plan(parse_steering({"edits": list(edits)}), bundles())


ADD = plan(edit("add", 60.0))
CLAMP = plan(edit("clamp", 50.0))
PROMPT = plan(edit("add", 60.0, scope="prompt"))
COMPLETION = plan(edit("add", 60.0, scope="completion"))
LAST_LAYER = plan(edit("add", 60.0, at=29))
WINDOW = plan(edit("clamp", 60.0, window=window(40, 75)))
GATED = plan(edit("clamp", 60.0, gate=gate(103, 2.0)))
ONWARD = plan(edit("clamp", 60.0, gate=gate(106, 10.0, mode="onward")))
ONWARD_LAST = plan(edit("clamp", 60.0, at=29, gate=gate(103, 2.0, mode="onward")))
TAIL = plan(edit("add", 60.0, window=window(-40, -3, "prompt_end")))


def same(a: Answer, b: Answer) -> bool:
    return a.tokens == b.tokens and all(abs(x - y) <= 1e-4 for x, y in zip(a.logprobs, b.logprobs, strict=True))


def check(answer: Answer, wanted: Plan | None) -> None:
    if wanted is not None:
        proof.verify(wanted, answer.proof, len(answer.prompt), [len(answer.tokens)])


KINDS = {
    "plain": None,
    "add": ADD,
    "completion": COMPLETION,
    "prompt": PROMPT,
    "onward": ONWARD,
    "clamp": CLAMP,
    "last": LAST_LAYER,
    "window": WINDOW,
    "tail": TAIL,
    "gated": GATED,
}


@pytest.mark.parametrize("n_kinds", [5, pytest.param(len(KINDS), marks=pytest.mark.slow)])
def test_any_order_on_one_prompt_equals_cold_runs(engine: Engine, n_kinds: int) -> None:
    kinds = dict(itertools.islice(KINDS.items(), n_kinds))
    cold = {}
    for name, wanted in kinds.items():
        engine.cold()
        (cold[name],) = engine.ask([(LONG, wanted)], n_tokens=6)
        assert cold[name].cached == 0
    assert not any(same(cold[a], cold[b]) for a, b in itertools.combinations(kinds, 2))
    for order in (list(reversed(kinds)), ["add", "plain", "completion", "plain", "add", "prompt"]):
        engine.cold()
        for name in order:
            (warm,) = engine.ask([(LONG, kinds[name])], n_tokens=6)
            assert same(warm, cold[name]), f"{name} in {order}"
            check(warm, kinds[name])


@pytest.mark.parametrize("first", ["plain", "steered"])
def test_steered_and_unsteered_share_no_block_after_the_first_edit(engine: Engine, first: str) -> None:
    engine.cold()
    for wanted in (None, ADD) if first == "plain" else (ADD, None):
        (answer,) = engine.ask([(LONG, wanted)])
        assert answer.cached == 0


def test_completion_scope_shares_the_plain_prompt(engine: Engine) -> None:
    engine.cold()
    (before,) = engine.ask([(LONG, None)])
    whole = (len(before.prompt) - 1) // BLOCK * BLOCK
    assert whole >= 3 * BLOCK
    (answer,) = engine.ask([(LONG, COMPLETION)])
    assert answer.cached == whole
    (after,) = engine.ask([(LONG, None)])
    assert after.cached == whole
    assert same(after, before)


def test_an_edit_of_the_last_layer_shares_every_block_and_its_proof_says_so(engine: Engine) -> None:
    engine.cold()
    (cold,) = engine.ask([(LONG, LAST_LAYER)])
    engine.cold()
    (plain,) = engine.ask([(LONG, None)])
    (warm,) = engine.ask([(LONG, LAST_LAYER)])
    whole = (len(plain.prompt) - 1) // BLOCK * BLOCK
    assert (cold.cached, warm.cached) == (0, whole)
    assert same(warm, cold)
    check(warm, LAST_LAYER)
    assert warm.proof is not None
    assert warm.proof["hook_points"]["blocks.29.resid_post"]["cached_prompt_tokens"] == whole - 1
    (plain_again,) = engine.ask([(LONG, None)])
    assert plain_again.cached == whole
    assert same(plain_again, plain)
    (both,) = engine.ask([(LONG, plan(edit("add", 60.0), edit("add", 60.0, at=29)))])
    assert both.cached == 0


def test_prompt_logprobs_of_a_last_layer_edit_are_its_own(engine: Engine) -> None:
    """vLLM computes the whole prompt again when they are asked for, so no position is left out as cached."""
    engine.cold()
    (plain,) = engine.generate([(LONG, None)], n_tokens=1, prompt_logprobs=0)
    (steered,) = engine.generate([(LONG, LAST_LAYER)], n_tokens=1, prompt_logprobs=0)
    engine.cold()
    (cold,) = engine.generate([(LONG, LAST_LAYER)], n_tokens=1, prompt_logprobs=0)

    def logprobs(output: Any) -> list[float]:
        tokens = output.prompt_token_ids[1:]
        return [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], tokens, strict=True)]

    assert logprobs(steered) == pytest.approx(logprobs(cold), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(logprobs(steered), logprobs(plain), strict=True)) > 0.1


def test_a_gate_by_token_shares_its_blocks_with_the_same_plan_alone(engine: Engine) -> None:
    engine.cold()
    engine.ask([(LONG, None)])
    (first,) = engine.ask([(LONG, GATED)])
    (again,) = engine.ask([(LONG, GATED)])
    assert (first.cached, again.cached) == (0, (len(first.prompt) - 1) // BLOCK * BLOCK)
    assert same(again, first)
    check(again, GATED)


@pytest.mark.parametrize("wanted", [ONWARD, ONWARD_LAST], ids=["middle", "last layer"])
def test_a_gate_that_stays_open_reads_every_position_itself(engine: Engine, wanted: Plan) -> None:
    engine.cold()
    engine.ask([(LONG, None)])
    (first,) = engine.ask([(LONG, wanted)])
    (again,) = engine.ask([(LONG, wanted)])
    assert (first.cached, again.cached) == (0, 0)
    assert same(again, first)
    assert first.proof == again.proof
    check(again, wanted)
    (plain,) = engine.ask([(LONG, None)])
    assert plain.cached == (len(plain.prompt) - 1) // BLOCK * BLOCK


def test_a_gate_that_watches_the_completion_shares_the_plain_prompt(engine: Engine) -> None:
    engine.cold()
    (plain,) = engine.ask([(LONG, None)])
    wanted = plan(edit("add", 60.0, scope="completion", gate=gate(103, 1.0, mode="onward")))
    (warm,) = engine.ask([(LONG, wanted)])
    assert warm.cached == (len(plain.prompt) - 1) // BLOCK * BLOCK
    check(warm, wanted)
    engine.cold()
    (cold,) = engine.ask([(LONG, wanted)])
    assert same(warm, cold)


def test_a_window_shares_the_blocks_before_it(engine: Engine) -> None:
    engine.cold()
    engine.ask([(LONG, None)])
    (late,) = engine.ask([(LONG, WINDOW)])
    assert late.cached == BLOCK
    check(late, WINDOW)
    (again,) = engine.ask([(LONG, WINDOW)])
    assert again.cached == (len(late.prompt) - 1) // BLOCK * BLOCK
    assert same(again, late)
    check(again, WINDOW)


def test_a_window_from_the_prompts_end_is_another_edit_in_a_longer_prompt(engine: Engine) -> None:
    engine.cold()
    (first,) = engine.ask([(LONG, TAIL)])
    longer = first.prompt + first.prompt[1:21]
    (warm,) = engine.ask([(longer, TAIL)])
    check(warm, TAIL)
    engine.cold()
    (cold,) = engine.ask([(longer, TAIL)])
    assert same(warm, cold)


def test_the_same_plan_shares_its_blocks_and_the_proof_counts_them_apart(engine: Engine) -> None:
    engine.cold()
    (cold,) = engine.ask([(LONG, ADD)])
    (warm,) = engine.ask([(LONG, ADD)])
    whole = (len(cold.prompt) - 1) // BLOCK * BLOCK
    assert (cold.cached, warm.cached) == (0, whole)
    assert cold.proof is not None
    assert warm.proof is not None
    before, after = (answer.proof["hook_points"]["blocks.14.resid_post"] for answer in (cold, warm) if answer.proof)
    n_edited = len(cold.prompt) - 2  # all but position 0 and the last, which is the first completion token
    assert (before["prompt_tokens"], before["cached_prompt_tokens"]) == (n_edited, 0)
    assert (after["prompt_tokens"], after["cached_prompt_tokens"]) == (n_edited - (whole - 1), whole - 1)
    assert before["completion_tokens"] == after["completion_tokens"] == len(cold.tokens)


def test_the_next_turn_of_a_prompt_scoped_plan_does_not_reuse_the_unedited_answer(engine: Engine) -> None:
    """The answer of one turn is prompt in the next: same plan, same tokens, other edits on the same positions."""
    engine.cold()
    (first,) = engine.ask([(LONG, PROMPT)], n_tokens=80)
    following = first.prompt + first.tokens + first.prompt[:9]
    (warm,) = engine.ask([(following, PROMPT)], n_tokens=6)
    shared = (len(first.prompt) - 1) // BLOCK * BLOCK
    assert warm.cached == shared
    engine.cold()
    (cold,) = engine.ask([(following, PROMPT)], n_tokens=6)
    assert same(warm, cold)
    check(warm, PROMPT)


def test_the_next_turn_of_an_all_scoped_plan_reuses_the_edited_answer(engine: Engine) -> None:
    engine.cold()
    (first,) = engine.ask([(LONG, ADD)], n_tokens=80)
    following = first.prompt + first.tokens + first.prompt[:9]
    (warm,) = engine.ask([(following, ADD)], n_tokens=6)
    assert warm.cached >= (len(first.prompt) + 79) // BLOCK * BLOCK
    engine.cold()
    (cold,) = engine.ask([(following, ADD)], n_tokens=6)
    assert same(warm, cold)
    check(warm, ADD)


def test_requests_of_one_batch_do_not_mix(engine: Engine) -> None:
    engine.cold()
    plans = [None, ADD, COMPLETION, PROMPT, None, ADD]
    first = engine.ask([(LONG, wanted) for wanted in plans])
    second = engine.ask([(LONG, wanted) for wanted in plans])
    for wanted, before, after in zip(plans, first, second, strict=True):
        assert same(before, after)
        check(after, wanted)
    for (i, a), (j, b) in itertools.combinations(enumerate(plans), 2):
        assert (first[i].tokens == first[j].tokens) or a is not b


def test_sixteen_plans_on_one_prompt_compute_it_once(
    engine: Engine, record_property: Callable[[str, object], None]
) -> None:
    """Keyed by the plan, as with a `cache_salt` of its hash, each of them would compute the whole prompt."""
    plans = [plan(edit("add", 20.0 + i, scope="completion")) for i in range(16)]
    engine.cold()
    first = engine.ask([(LONG, plans[0])], n_tokens=2)
    rest = engine.ask([(LONG, wanted) for wanted in plans[1:]], n_tokens=2)
    for wanted, answer in zip(plans, [*first, *rest], strict=True):
        check(answer, wanted)
    n = len(first[0].prompt)
    computed = sum(n - answer.cached for answer in (*first, *rest))
    record_property("prompt_tokens_computed", f"{computed} of {16 * n}")
    assert computed == n + 15 * (n - (n - 1) // BLOCK * BLOCK)
