"""A compiled engine with a cache of its own, as a program: its answers and the names of its compiled artifacts.

VLLM_CACHE_ROOT=… python -m tests.parity.compiled MODEL_FOLDER                     with the plugin, steered
VLLM_CACHE_ROOT=… VLLM_PLUGINS= python -m tests.parity.compiled MODEL_FOLDER       without it
"""

import os
import sys
from pathlib import Path
from typing import Any

from tests.parity.architectures.compare import Asked, ask
from tests.parity.on_device import PROMPTS, bundles, plans
from tests.parity.program import say
from trimtab.server.engine.bundles import register_bundle
from trimtab.server.engine.handshake import prove_llm


def asked() -> list[Any]:
    """(prompt, plan): each prompt with each plan, and with none."""
    return [(prompt, plan) for prompt in PROMPTS for plan in plans(bundles())]


def main(folder: str) -> dict[str, Any]:
    """Answers to `asked`, those with a plan left out where there is no plugin."""
    from vllm import LLM

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
    answers = ask(llm, [Asked(prompt, plan) for prompt, plan in chosen])
    llm.llm_engine.engine_core.shutdown()
    artifacts = Path(os.environ["VLLM_CACHE_ROOT"]) / "torch_compile_cache" / "torch_aot_compile"
    return {"answers": answers, "artifacts": sorted(path.name for path in artifacts.iterdir())}


if __name__ == "__main__":
    say(main(sys.argv[1]))
