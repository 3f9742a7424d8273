"""The offline engine of the parity tests, asked with plans."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.parity.cases import PROMPTS, Case
from tests.parity.rows import bundles
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.embedded import model_path
from trimtab.server.engine.bundles import register_bundle
from trimtab.server.engine.handshake import prove_llm
from trimtab.server.engine.proof import KEY
from trimtab.server.plan import Plan

N_TOKENS = 12
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 32,
    "max_model_len": 512,
    # Small, so that long prompts are prefilled in chunks, beside others.
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "enable_prefix_caching": True,
    "disable_log_stats": True,
}


class Answer(NamedTuple):
    """What the engine said to one request."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cached: int
    proof: dict[str, Any] | None
    text: str


class Engine:
    """The offline engine, asked with plans."""

    def __init__(self, folder: Path | None = None, loaded: Mapping[str, Bundle] | None = None, **changes: Any) -> None:
        from vllm import LLM

        self.llm = LLM(model=str(folder or model_path()), **{**ENGINE, **changes})
        hashes = [register_bundle(self.llm, bundle) for bundle in (loaded or bundles()).values()]
        self.reports = prove_llm(self.llm, hashes)

    def ask(
        self, requests: Sequence[tuple[str | list[int], Plan | None]], *, n_tokens: int = N_TOKENS, **params: Any
    ) -> list[Answer]:
        """Greedy answers to (prompt, plan) requests, in one batch."""
        outputs = self.generate(requests, n_tokens=n_tokens, **params)
        return [answer(output) for output in outputs]

    def generate(
        self, requests: Sequence[tuple[str | list[int], Plan | None]], *, n_tokens: int = N_TOKENS, **params: Any
    ) -> list[Any]:
        """The same, as vLLM's own outputs."""
        from vllm import SamplingParams

        fields: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": n_tokens,
            "logprobs": 0,
            "ignore_eos": True,
        } | params
        sampling = [SamplingParams(**fields, extra_args={KEY: plan.wire()} if plan else None) for _, plan in requests]
        prompts: Any = [p if isinstance(p, str) else {"prompt_token_ids": p} for p, _ in requests]
        return self.llm.generate(prompts, sampling, use_tqdm=False)

    def cold(self) -> None:
        """Forget every cached block."""
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        """End the engine's processes, and the sockets to them, which vLLM leaves to the garbage collector."""
        core: Any = self.llm.llm_engine.engine_core
        core.shutdown()
        core.output_queue_thread.join(10)
        core.ctx.term()


def answer(output: Any, i: int = 0) -> Answer:
    """Sample i of vLLM's output, with the proof of all of them."""
    sample = output.outputs[i]
    return Answer(
        list(output.prompt_token_ids),
        list(sample.token_ids),
        [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)],
        output.num_cached_tokens,
        (output.kv_transfer_params or {}).get(KEY),
        sample.text,
    )


def ask_cases(engine: Engine, cases: Sequence[Case]) -> dict[str, Answer]:
    """Answers by case name, from one batch on a cold cache."""
    engine.cold()
    answers = engine.ask([(PROMPTS[case.prompt], case.plan) for case in cases])
    return dict(zip((case.name for case in cases), answers, strict=True))
