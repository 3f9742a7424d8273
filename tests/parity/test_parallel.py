"""Several ranks answer as one: tensor parallel, pipeline parallel, both; whatever the scheduler does."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.parity import tiny
from tests.parity.engine import Answer, Engine
from tests.parity.reference import Reference
from tests.parity.test_edits import TOLERANCE, apart
from trimtab.server.engine import op, proof
from trimtab.server.engine.bundles import register_bundle, unregister_bundle
from trimtab.server.errors import NotApplied
from trimtab.server.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore")
TP, PP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
N_QUICK, N_CASES, N_TOKENS = 32, 240, 8
BY_HASH = {bundle.content_hash: bundle for bundle in tiny.bundles().values()}
EVERYWHERE = tiny.plan(*({"bundle": f"l{i}", "latent": 100, "operation": "add", "amount": 2.0} for i in range(4)))
PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    tiny.save(made)
    return made


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    found = Reference(folder)
    found.special = tiny.SPECIAL
    return found


@contextmanager
def started(folder: Path, **changes: Any) -> Iterator[Engine]:
    """An engine on the tiny model. Its workers share the cores as the system sees fit, and take functions to call."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        engine = Engine(folder, tiny.bundles(), **{"max_model_len": 256, "num_gpu_blocks_override": 256} | changes)
        yield engine
        engine.close()


@pytest.fixture(scope="module")
def tensor(folder: Path) -> Iterator[Engine]:
    with started(folder, **TP) as engine:
        yield engine


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[Engine]:
    with started(folder, **PP) as engine:
        yield engine


def ask(engine: Engine, n: int, n_tokens: int = N_TOKENS) -> list[Answer]:
    return engine.ask([(list(prompt), plan) for prompt, plan in tiny.cases(n)], n_tokens=n_tokens)


def check_proofs(n: int, answers: Sequence[Answer]) -> None:
    for (_, plan), answer in zip(tiny.cases(n), answers, strict=True):
        if plan is None:
            assert answer.proof is None
        else:
            proof.verify(plan, answer.proof, len(answer.prompt), [len(answer.tokens)])


def check(n: int, answers: Sequence[Answer], reference: Reference) -> float:
    """The largest difference of a log-probability to transformers; tokens, proofs and what they tell are the same."""
    check_proofs(n, answers)
    worst = 0.0
    for (prompt, plan), answer in zip(tiny.cases(n), answers, strict=True):
        expected = reference(plan, BY_HASH, list(prompt), answer.tokens)
        assert answer.tokens == expected.tokens, plan
        worst = max(worst, apart(answer.logprobs, expected.logprobs))
        for layer, wanted in expected.layers.items():
            point = (answer.proof or {})["hook_points"][f"blocks.{layer}.resid_post"]
            for name in ("gate_firings", "special_tokens"):
                assert point[name] == getattr(wanted, name)
            for name in ("max_relative_norm", "mean_relative_norm"):
                assert point[name] == pytest.approx(getattr(wanted, name), rel=1e-3, abs=1e-6)
    return worst


def same(a: Sequence[Answer], b: Sequence[Answer], n_tokens: int = N_TOKENS) -> bool:
    return all(
        x.tokens[:n_tokens] == y.tokens[:n_tokens] and apart(x.logprobs[:n_tokens], y.logprobs[:n_tokens]) <= TOLERANCE
        for x, y in zip(a, b, strict=True)
    )


def on_rank(engine: Engine, rank: int, act: Callable[[Any], None]) -> None:
    """Do something to the plugin of one worker."""

    def call(worker: Any) -> None:
        if worker.rank == rank:
            act(worker.trimtab)

    engine.llm.collective_rpc(call)


def failure(engine: Engine, plan: Plan = EVERYWHERE) -> str:
    """Why the reply is refused, of a request beside an unsteered one that is not harmed."""
    engine.cold()
    steered, plain = engine.ask([(PROMPT, plan), (PROMPT, None)], n_tokens=4)
    assert (len(plain.tokens), plain.proof) == (4, None)
    with pytest.raises(NotApplied) as refused:
        proof.verify(plan, steered.proof, len(PROMPT), [4])
    return str(refused.value)


@pytest.mark.slow
def test_two_tensor_parallel_ranks_equal_transformers(
    tensor: Engine, reference: Reference, record_property: Callable[[str, object], None]
) -> None:
    assert [report["layers"] for report in tensor.reports] == [[0, 1, 2, 3]] * 2
    worst = check(N_QUICK, ask(tensor, N_QUICK), reference)
    record_property("max_logprob_difference", worst)
    assert worst <= TOLERANCE


def test_two_pipeline_stages_equal_transformers(
    pipeline: Engine, reference: Reference, record_property: Callable[[str, object], None]
) -> None:
    assert [(report["layers"], report["elsewhere"]) for report in pipeline.reports] == [
        ([0, 1], [2, 3]),
        ([2, 3], [0, 1]),
    ]
    worst = check(N_QUICK, ask(pipeline, N_QUICK), reference)
    record_property("max_logprob_difference", worst)
    assert worst <= TOLERANCE


@pytest.mark.slow
def test_a_tensor_parallel_rank_that_edits_otherwise_fails_the_request(tensor: Engine) -> None:
    def distort(plugin: Any, factor: float) -> None:
        plugin.state.tables.bundles[tiny.bundles()["l1"].content_hash]["latent"].d_KD.mul_(factor)
        plugin.state.tables._slots.clear()

    on_rank(tensor, 1, lambda plugin: distort(plugin, 2.0))
    try:
        assert "tensor-parallel ranks 0 and 1 of pipeline stage 0 did not edit alike" in failure(tensor)
    finally:
        on_rank(tensor, 1, lambda plugin: distort(plugin, 0.5))


@pytest.mark.parametrize(("rank", "layer"), [(0, "l0"), (1, "l3")])
def test_a_stage_that_lost_a_bundle_fails_the_request(pipeline: Engine, rank: int, layer: str) -> None:
    bundle = tiny.bundles()[layer]
    data, content_hash = bundle.to_bytes(), bundle.content_hash
    on_rank(pipeline, rank, lambda plugin: plugin.unload_bundle(content_hash))
    try:
        assert "not loaded in this worker" in failure(pipeline)
    finally:
        on_rank(pipeline, rank, lambda plugin: plugin.load_bundle(data))


def test_a_stage_whose_hooks_do_nothing_fails_the_request(pipeline: Engine) -> None:
    """The counts of the first stage reach the reply by its own report alone."""
    on_rank(pipeline, 0, lambda plugin: op.bind(None))
    try:
        assert "the hook of layer 0 was not called in a step that needed it" in failure(pipeline)
    finally:
        on_rank(pipeline, 0, lambda plugin: op.bind(plugin.state))


def test_bundles_come_and_go_in_every_stage(pipeline: Engine) -> None:
    bundle = tiny.bundles()["l0"]
    assert unregister_bundle(pipeline.llm, bundle.content_hash)
    reports = pipeline.llm.collective_rpc("trimtab_handshake")
    assert not any(bundle.content_hash in report["bundles"] for report in reports)
    register_bundle(pipeline.llm, bundle)
    (answer,) = pipeline.ask([(PROMPT, EVERYWHERE)], n_tokens=4)
    proof.verify(EVERYWHERE, answer.proof, len(PROMPT), [4])
    pipeline.ask([(PROMPT, None)], n_tokens=1)
    assert [report["requests"] for report in pipeline.llm.collective_rpc("trimtab_handshake")] == [0, 0]


@pytest.mark.slow
def test_stages_and_ranks_answer_alike(tensor: Engine, pipeline: Engine) -> None:
    for engine in (tensor, pipeline):
        engine.cold()
    a, b = ask(tensor, N_QUICK), ask(pipeline, N_QUICK)
    assert same(a, b)
    for engine, cold in ((tensor, a), (pipeline, b)):
        warm = ask(engine, N_QUICK)
        assert sum(answer.cached for answer in warm) > 0
        assert same(warm, cold)
        check_proofs(N_QUICK, warm)


@pytest.fixture(scope="module")
def one(folder: Path) -> list[Answer]:
    """What one worker answers."""
    with started(folder) as engine:
        return ask(engine, N_CASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "n_tokens"),
    [
        (TP, N_TOKENS),
        (PP, N_TOKENS),
        (TP | PP, N_TOKENS),
        ({"pipeline_parallel_size": 4}, N_TOKENS),
        (PP | {"max_num_batched_tokens": 8, "max_num_seqs": 8}, N_TOKENS),
        (PP | {"num_gpu_blocks_override": 14, "disable_log_stats": False}, 40),
        (TP | PP | {"enforce_eager": False}, N_TOKENS),
    ],
    ids=["TP2", "PP2", "TP2 PP2", "PP4", "PP2, 8 tokens a step", "PP2, 13 blocks", "TP2 PP2, compiled"],
)
def test_all_cases_equal_one_worker_and_transformers(
    changes: dict[str, Any],
    n_tokens: int,
    folder: Path,
    one: list[Answer],
    reference: Reference,
    record_property: Callable[[str, object], None],
) -> None:
    with started(folder, **changes) as engine:
        answers = ask(engine, N_CASES, n_tokens)
        if n_tokens > N_TOKENS:
            from tests.parity.test_other_engines import preemptions

            assert preemptions(engine) > 0
        assert same(answers, one)
        worst = check(N_CASES, answers, reference)
        record_property("max_logprob_difference", worst)
        assert worst <= TOLERANCE
        warm = ask(engine, N_CASES, n_tokens)
        assert same(warm, answers)
        check_proofs(N_CASES, warm)
