"""An engine of eight tokens a step, with an n-gram drafter that guesses two.

So every prompt is prefilled in many chunks beside others, and most steps run drafts, which are accepted or not. The answers are
those of transformers, and every proof is whole.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.parity.cases import PROMPTS, STEERED, UNSTEERED, Case
from tests.parity.engine import Answer, Engine
from tests.parity.generated import N_CASES, cases
from tests.parity.rows import bundles
from tests.parity.test_edits import TOLERANCE, apart
from trimtab.server.engine import proof

pytestmark = pytest.mark.filterwarnings("ignore")
BY_HASH = {bundle.content_hash: bundle for bundle in bundles().values()}
N_TOKENS = 24
DRAFTING: dict[str, Any] = {
    "max_num_batched_tokens": 8,
    "max_num_seqs": 8,
    "max_model_len": 224,
    "disable_log_stats": False,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 2,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
}
HARDEST = (
    "gates of every kind",
    "gate, onward within the completion",
    "windows that take turns",
    "window, across the prompt's end",
    "64 latents at once",
    "SAE, a gate on a real latent",
    "add at the last layer",
)
"""Of the cases by hand."""


@pytest.fixture(scope="module")
def drafting() -> Iterator[Engine]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = Engine(**DRAFTING)
        yield started
        started.close()


def counted(engine: Engine, name: str) -> int:
    metrics: list[Any] = list(engine.llm.get_metrics())
    return sum(int(metric.value) for metric in metrics if metric.name == name)


def wrong(case: Case, found: Answer, reference: Callable[..., Any]) -> list[str]:
    """What is not as in transformers."""
    wanted = reference(case.plan, BY_HASH, found.prompt, found.tokens)
    lines = []
    if found.tokens != wanted.tokens:
        lines.append(f"tokens {found.tokens} and not {wanted.tokens}")
    if (far := apart(found.logprobs, wanted.logprobs)) > TOLERANCE:
        lines.append(f"log-probabilities differ by {far:.1e}")
    if case.plan is not None:
        proof.verify(case.plan, found.proof, len(found.prompt), [len(found.tokens)])
        for layer, edited in wanted.layers.items():
            point = (found.proof or {})["hook_points"][f"blocks.{layer}.resid_post"]
            # Positions out of the cache were counted when they were run, by whoever ran them.
            if not point["cached_prompt_tokens"]:
                for name in ("gate_firings", "special_tokens"):
                    if point[name] != getattr(edited, name):
                        lines.append(f"{name} at layer {layer}: {point[name]}, not {getattr(edited, name)}")
                if point["max_relative_norm"] != pytest.approx(edited.max_relative_norm, rel=1e-3):
                    lines.append(f"largest norm at layer {layer}: {point['max_relative_norm']}")
                if point["mean_relative_norm"] != pytest.approx(edited.mean_relative_norm, rel=1e-3):
                    lines.append(f"mean norm at layer {layer}: {point['mean_relative_norm']}")
    elif found.proof is not None:
        lines.append("a proof of nothing")
    return [f"{case.name}: {line}" for line in lines]


def run(engine: Engine, chosen: list[Case], reference: Callable[..., Any]) -> None:
    engine.cold()
    before = {name: counted(engine, name) for name in COUNTERS}
    answers = engine.ask([(PROMPTS.get(case.prompt, case.prompt), case.plan) for case in chosen], n_tokens=N_TOKENS)
    found = [line for case, answer in zip(chosen, answers, strict=True) for line in wrong(case, answer, reference)]
    assert found == []
    drafted, accepted = (counted(engine, name) - before[name] for name in COUNTERS)
    assert 0 < accepted < drafted
    (report,) = engine.llm.collective_rpc("trimtab_handshake")
    assert [report[name] for name in ("requests", "slots", "gates")] == [0, 0, 0]


COUNTERS = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")


@pytest.mark.slow
def test_the_hardest_cases_equal_transformers(drafting: Engine, reference: Callable[..., Any]) -> None:
    by_name = {case.name: case for case in STEERED}
    run(drafting, [*(by_name[name] for name in HARDEST), UNSTEERED[0]], reference)


@pytest.mark.slow
def test_all_cases_equal_transformers(drafting: Engine, reference: Callable[..., Any]) -> None:
    assert len(cases()) == N_CASES
    chosen: list[Case] = [*STEERED, *UNSTEERED, *cases()]
    for i in range(0, len(chosen), 50):
        run(drafting, chosen[i : i + 50], reference)
