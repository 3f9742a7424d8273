"""The same answers from engines of other shapes: compiled, and short of memory. Each starts an engine of its own, in minutes."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.parity.cases import PROMPTS, STEERED, UNSTEERED, edit
from tests.parity.engine import Engine, ask_cases
from tests.parity.rows import bundles
from trimtab.server.engine import proof
from trimtab.server.plan import compile_plan
from trimtab.server.steering import parse_steering

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CASES = (*UNSTEERED, *STEERED)
BY_HASH = {bundle.content_hash: bundle for bundle in bundles().values()}


@pytest.fixture(scope="module")
def cramped() -> Iterator[Engine]:
    """Room for nine blocks of 32 tokens: requests that grow preempt each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = Engine(num_gpu_blocks_override=10, max_model_len=256, disable_log_stats=False)
        yield started
        started.close()


def check(engine: Engine, reference: Callable[..., Any]) -> float:
    worst = 0.0
    answers = ask_cases(engine, CASES)
    for case in CASES:
        answer = answers[case.name]
        expected = reference(case.plan, BY_HASH, answer.prompt, answer.tokens)
        assert answer.tokens == expected.tokens, case.name
        worst = max(worst, *(abs(a - b) for a, b in zip(answer.logprobs, expected.logprobs, strict=True)))
        if case.plan is not None:
            proof.verify(case.plan, answer.proof, len(answer.prompt), [len(answer.tokens)])
    return worst


def test_compiled_equals_transformers(
    compiled: Engine, reference: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    worst = check(compiled, reference)
    record_property("max_logprob_difference", worst)
    assert worst <= 1e-4


def test_preempted_requests_equal_transformers_and_count_once(cramped: Engine, reference: Callable[..., Any]) -> None:
    assert check(cramped, reference) <= 1e-4
    plan = compile_plan(parse_steering({"edits": [edit("add", 40.0)]}), bundles())
    gate = {"latent": 103, "above": 2.0, "mode": "onward"}
    onward = compile_plan(parse_steering({"edits": [edit("clamp", 30.0, scope="completion", gate=gate)]}), bundles())
    plans = [None, plan, onward, plan, None, onward]
    answers = cramped.ask([(PROMPTS["short"], wanted) for wanted in plans], n_tokens=100)
    assert preemptions(cramped) > 0
    for wanted, answer in zip(plans, answers, strict=True):
        expected = reference(wanted, BY_HASH, answer.prompt, answer.tokens)
        assert answer.tokens == expected.tokens
        if wanted is not None:
            proof.verify(wanted, answer.proof, len(answer.prompt), [100])
            for layer, found in expected.layers.items():
                point = (answer.proof or {})["hook_points"][f"blocks.{layer}.resid_post"]
                assert point["gate_firings"] == found.gate_firings


def preemptions(engine: Engine) -> int:
    metrics: list[Any] = list(engine.llm.get_metrics())
    return sum(int(metric.value) for metric in metrics if metric.name == "vllm:num_preemptions")
