"""Generated edits over the whole language: steered vLLM is transformers with forward hooks, whatever the scheduler does.

The reference is teacher-forced with vLLM's tokens: if at every position its most likely token is the one that vLLM chose, the two
greedy generations are the same. A tie of two tokens would show as a difference here; the cases are fixed, and none has one.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.parity.cases import Case
from tests.parity.engine import Answer, Engine
from tests.parity.generated import N_CASES, N_QUICK, cases
from tests.parity.rows import bundles
from tests.parity.test_edits import TOLERANCE, apart
from tests.parity.test_other_engines import preemptions
from trimtab.server.engine import proof
from trimtab.server.errors import NotApplied

pytestmark = pytest.mark.filterwarnings("ignore")
N_TOKENS = 6
BY_HASH = {bundle.content_hash: bundle for bundle in bundles().values()}
QUICK, ALL = cases()[:N_QUICK], cases()


def ask(engine: Engine, chosen: Sequence[Case], *, n_tokens: int = N_TOKENS) -> list[Answer]:
    """The answers of one batch: every fourth request of it is unsteered company."""
    requests: list[Any] = []
    for i, case in enumerate(chosen):
        requests.append((case.prompt, case.plan))
        if i % 3 == 2:
            requests.append((case.prompt, None))
    answers = engine.ask(requests, n_tokens=n_tokens)
    return [answer for answer, (_, plan) in zip(answers, requests, strict=True) if plan is not None]


def differences(chosen: Sequence[Case], a: Sequence[Any], b: Sequence[Any], n: int = N_TOKENS) -> list[str]:
    """A line for each case whose first n tokens or log-probabilities differ."""
    found = []
    for case, x, y in zip(chosen, a, b, strict=True):
        if x.tokens[:n] != y.tokens[:n]:
            found.append(f"{case.name}: tokens {x.tokens[:n]} and {y.tokens[:n]}; {case.prompt!r} {case.steering}")
        elif (far := apart(x.logprobs[:n], y.logprobs[:n])) > TOLERANCE:
            found.append(f"{case.name}: log-probabilities differ by {far:.1e}; {case.prompt!r} {case.steering}")
    return found


def unproven(chosen: Sequence[Case], answers: Sequence[Answer]) -> list[str]:
    """A line for each case whose proof does not hold."""
    found = []
    for case, answer in zip(chosen, answers, strict=True):
        try:
            assert case.plan is not None
            proof.verify(case.plan, answer.proof, len(answer.prompt), [len(answer.tokens)])
        except NotApplied as e:
            found.append(f"{case.name}: {e.message}; {case.steering}")
    return found


def expected(reference: Callable[..., Any], chosen: Sequence[Case], answers: Sequence[Answer]) -> list[Any]:
    return [reference(case.plan, BY_HASH, a.prompt, a.tokens) for case, a in zip(chosen, answers, strict=True)]


def worst(a: Sequence[Any], b: Sequence[Any]) -> float:
    return max(apart(x.logprobs, y.logprobs) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def quick(engine: Engine) -> list[Answer]:
    engine.cold()
    return ask(engine, QUICK)


def test_the_cases_are_many_different_and_cover_the_language() -> None:
    assert len(ALL) == N_CASES >= 200
    assert len({(case.prompt, case.plan.hash) for case in ALL if case.plan}) == N_CASES
    edits = [edit for case in ALL for edit in (case.steering or {}).get("edits", [])]
    assert {edit["operation"] for edit in edits} == {"add", "ablate", "clamp", "scale", "project"}
    assert {edit.get("unit", "raw") for edit in edits} == {"raw", "max_act", "resid_norm"}
    assert any("vector" in edit for edit in edits)
    scopes = {key for edit in edits for key in edit.get("scope", {})}
    assert scopes == {"window", "tokens", "first_token", "exclude_special"}
    assert {edit["gate"]["mode"] for edit in edits if "gate" in edit} == {"token", "onward"}
    assert max(len(case.plan.layers) for case in ALL if case.plan) >= 3
    assert any("bundle" in (case.steering or {}) for case in ALL)


def test_generated_edits_mixed_equal_transformers(
    quick: list[Answer], reference: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    wanted = expected(reference, QUICK, quick)
    record_property("max_logprob_difference", worst(quick, wanted))
    assert differences(QUICK, quick, wanted) == []
    assert unproven(QUICK, quick) == []


def test_generated_edits_alone_equal_mixed(engine: Engine, quick: list[Answer]) -> None:
    few = QUICK[::3]
    engine.cold()
    alone = [engine.ask([(case.prompt, case.plan)], n_tokens=N_TOKENS)[0] for case in few]
    assert differences(few, alone, quick[::3]) == []


def test_generated_edits_from_the_cache_equal_cold(engine: Engine, quick: list[Answer]) -> None:
    engine.cold()
    ask(engine, QUICK)
    cached = ask(engine, QUICK)
    assert sum(answer.cached for answer in cached) > 0
    assert differences(QUICK, cached, quick) == []
    assert unproven(QUICK, cached) == []


@pytest.fixture(scope="module")
def all_mixed(engine: Engine) -> list[Answer]:
    engine.cold()
    return ask(engine, ALL)


@pytest.mark.slow
def test_all_generated_edits_mixed_equal_transformers(
    all_mixed: list[Answer], reference: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    wanted = expected(reference, ALL, all_mixed)
    record_property("max_logprob_difference", worst(all_mixed, wanted))
    assert differences(ALL, all_mixed, wanted) == []
    assert unproven(ALL, all_mixed) == []


@pytest.mark.slow
def test_all_generated_edits_alone_equal_mixed(engine: Engine, all_mixed: list[Answer]) -> None:
    engine.cold()
    alone = [engine.ask([(case.prompt, case.plan)], n_tokens=N_TOKENS)[0] for case in ALL]
    assert differences(ALL, alone, all_mixed) == []


@pytest.mark.slow
def test_all_generated_edits_from_the_cache_equal_cold(engine: Engine, all_mixed: list[Answer]) -> None:
    ask(engine, ALL)
    cached = ask(engine, ALL)
    assert sum(answer.cached for answer in cached) > 0
    assert differences(ALL, cached, all_mixed) == []
    assert unproven(ALL, cached) == []


@pytest.fixture
def another(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = Engine(**request.param)
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.parametrize("another", [{"max_num_batched_tokens": 8, "max_num_seqs": 8}], indirect=True, ids=["8 tokens"])
def test_all_generated_edits_in_chunks_equal_whole(another: Engine, all_mixed: list[Answer]) -> None:
    chunked = ask(another, ALL)
    assert differences(ALL, chunked, all_mixed) == []
    assert unproven(ALL, chunked) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "another",
    [{"num_gpu_blocks_override": 14, "max_model_len": 256, "disable_log_stats": False}],
    indirect=True,
    ids=["13 blocks"],
)
def test_all_generated_edits_preempted_equal_undisturbed(another: Engine, all_mixed: list[Answer]) -> None:
    """Longer answers, so that requests outgrow the cache: the tokens that both have are the same."""
    preempted = ask(another, ALL, n_tokens=36)
    assert preemptions(another) > 0
    assert differences(ALL, preempted, all_mixed) == []
    assert unproven(ALL, preempted) == []


@pytest.mark.slow
def test_all_generated_edits_compiled_equal_transformers(
    compiled: Engine, reference: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    answers = ask(compiled, ALL)
    wanted = expected(reference, ALL, answers)
    record_property("max_logprob_difference", worst(answers, wanted))
    assert differences(ALL, answers, wanted) == []
    assert unproven(ALL, answers) == []
