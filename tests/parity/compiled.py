"""A compiled engine with a cache of its own, as a program: its answers and the names of its compiled artifacts.

VLLM_CACHE_ROOT=… python -m tests.parity.compiled MODEL_FOLDER                     with the plugin, steered
VLLM_CACHE_ROOT=… VLLM_PLUGINS= python -m tests.parity.compiled MODEL_FOLDER       without it
"""

import os
import sys
from pathlib import Path
from typing import Any

from tests.parity.on_device import PROMPTS, bundles, plans
from tests.parity.program import say
from trimtab.server.engine.bundles import register_bundle
from trimtab.server.engine.handshake import prove_llm
from trimtab.server.engine.proof import KEY, verify

N_TOKENS = 6


def asked() -> list[Any]:
    """(prompt, plan): each prompt with each plan, and with none."""
    return [(prompt, plan) for prompt in PROMPTS for plan in plans(bundles())]


def main(folder: str) -> dict[str, Any]:
    """Answers to `asked`, those with a plan left out where there is no plugin."""
    from vllm import LLM, SamplingParams

    steers = os.environ.get("VLLM_PLUGINS") is None
    llm = LLM(
        model=folder,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=32,
        block_size=32,
        num_gpu_blocks_override=64,
    )
    if steers:
        for bundle in bundles().values():
            register_bundle(llm, bundle)
        prove_llm(llm, [bundle.content_hash for bundle in bundles().values()])
    chosen = [(prompt, plan) for prompt, plan in asked() if steers or plan is None]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=N_TOKENS,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args={KEY: plan.wire()} if plan else None,
        )
        for _, plan in chosen
    ]
    prompts: Any = [{"prompt_token_ids": prompt} for prompt, _ in chosen]
    answers = []
    for output, (prompt, plan) in zip(llm.generate(prompts, params, use_tqdm=False), chosen, strict=True):
        sample: Any = output.outputs[0]
        if plan is not None:
            verify(plan, (output.kv_transfer_params or {}).get(KEY), len(prompt), [N_TOKENS])
        logprobs = [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        answers.append([list(sample.token_ids), logprobs])
    llm.llm_engine.engine_core.shutdown()
    artifacts = Path(os.environ["VLLM_CACHE_ROOT"]) / "torch_compile_cache" / "torch_aot_compile"
    return {"answers": answers, "artifacts": sorted(path.name for path in artifacts.iterdir())}


if __name__ == "__main__":
    say(main(sys.argv[1]))
