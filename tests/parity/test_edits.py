"""Steered vLLM equals transformers with the reference formula in forward hooks, alone and in any company."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.parity.cases import PROMPTS, STEERED, UNSTEERED, Case
from tests.parity.engine import Answer, Engine
from tests.parity.rows import bundles
from trimtab.server.engine import proof

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-4
BY_HASH = {bundle.content_hash: bundle for bundle in bundles().values()}


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", [*STEERED, *UNSTEERED], ids=lambda case: case.name)
def test_a_mixed_batch_gives_each_request_what_transformers_gives(
    case: Case, mixed: dict[str, Answer], reference: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    answer = mixed[case.name]
    expected = reference(case.plan, BY_HASH, answer.prompt, answer.tokens)
    record_property("max_logprob_difference", apart(answer.logprobs, expected.logprobs))
    assert answer.tokens == expected.tokens
    assert apart(answer.logprobs, expected.logprobs) <= TOLERANCE
    if case.plan is None:
        assert answer.proof is None
        return
    proof.verify(case.plan, answer.proof, len(answer.prompt), [len(answer.tokens)])
    assert answer.proof is not None
    for layer, wanted in expected.layers.items():
        point = answer.proof["hook_points"][f"blocks.{layer}.resid_post"]
        for name in ("gate_firings", "special_tokens"):
            assert point[name] == getattr(wanted, name)
        for name in ("max_relative_norm", "mean_relative_norm"):
            assert point[name] == pytest.approx(getattr(wanted, name), rel=1e-3)


@pytest.mark.parametrize("case", STEERED, ids=lambda case: case.name)
def test_every_edit_has_an_effect(case: Case, mixed: dict[str, Answer], reference: Callable[..., Any]) -> None:
    answer = mixed[case.name]
    without = reference(None, BY_HASH, answer.prompt, answer.tokens)
    assert apart(answer.logprobs, without.logprobs) > 20 * TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if i % 3 == 0 else pytest.mark.slow, id=case.name)
        for i, case in enumerate([*STEERED, *UNSTEERED])
    ],
)
def test_alone_equals_in_the_mixed_batch(case: Case, mixed: dict[str, Answer], engine: Engine) -> None:
    """As far as any window of the cases goes."""
    engine.cold()
    (alone,) = engine.ask([(PROMPTS[case.prompt], case.plan)], n_tokens=7)
    assert alone.tokens == mixed[case.name].tokens[:7]
    assert apart(alone.logprobs, mixed[case.name].logprobs[:7]) <= TOLERANCE


@pytest.mark.parametrize("case", UNSTEERED, ids=lambda case: case.name)
def test_unsteered_equals_vllm_without_the_plugin(
    case: Case, mixed: dict[str, Answer], unsteered: dict[str, Answer], plain: dict[str, Any]
) -> None:
    assert unsteered[case.name].tokens == plain[case.name]["tokens"] == mixed[case.name].tokens
    assert apart(unsteered[case.name].logprobs, plain[case.name]["logprobs"]) <= 1e-6


def test_an_engine_without_the_plugin_is_refused(plain: dict[str, Any]) -> None:
    assert "trimtab" in plain["refusal"]
