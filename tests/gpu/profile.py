"""Counts the kernels of a decode, idle and steered, and the memory that graphs took: run as a program on a GPU."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.parity.on_device import N_LAYERS, PROMPTS, bundles, model, plans
from tests.parity.program import say
from trimtab.server.engine.bundles import register_bundle
from trimtab.server.engine.handshake import prove_llm
from trimtab.server.engine.proof import KEY

N_TOKENS = 16
KERNEL = "_edit"


def count(llm: Any, params: Any) -> dict[str, int]:
    """Kernels that one request launched, and how many of them were the edit's."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    prompt = {"prompt_token_ids": PROMPTS[0]}
    llm.generate([prompt], params, use_tqdm=False)  # warm
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        llm.generate([prompt], params, use_tqdm=False)
        torch.cuda.synchronize()
    names = [e.name for e in profiler.events() if e.device_type.name == "CUDA" and "Mem" not in e.name]
    return {"kernels": len(names), "edits": sum(name.startswith(KERNEL) for name in names)}


def main(plugin: bool) -> dict[str, Any]:
    """One engine of the tiny model with vLLM's own default graphs."""
    import torch
    from vllm import LLM, SamplingParams

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model(folder)
        started, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
        llm = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=128,
            max_num_seqs=16,
            enable_prefix_caching=False,
            num_gpu_blocks_override=64,
        )
        seconds, taken = time.perf_counter() - started, free - torch.cuda.mem_get_info()[0]
        fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": N_TOKENS, "ignore_eos": True, "detokenize": False}
        answer: dict[str, Any] = {
            "seconds_to_start": seconds,
            "bytes_taken": taken,
            "layers": N_LAYERS,
            "steps": N_TOKENS,  # one of prefill, the others of decode
            "idle": count(llm, SamplingParams(**fields)),
        }
        if plugin:
            found = bundles()
            for bundle in found.values():
                register_bundle(llm, bundle)
            prove_llm(llm, [bundle.content_hash for bundle in found.values()])
            steered = plans(found)[2]
            if steered is None:
                raise RuntimeError("the third plan edits two layers")
            answer["steered"] = count(llm, SamplingParams(**fields, extra_args={KEY: steered.wire()}))
    return answer


if __name__ == "__main__":
    say(main(sys.argv[1] == "plugin"))
