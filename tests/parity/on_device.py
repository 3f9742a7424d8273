"""The edit as CUDA graphs need it, in the real engine beside transformers: run as a program, prints its findings.

    python -m tests.parity.on_device v1                           on the host, the torch operator
    TRITON_INTERPRET=1 python -m tests.parity.on_device v2        in Triton's interpreter, the kernel too
    python -m tests.parity.on_device v2 --cuda --graphs FULL      on a GPU, with vLLM's `cudagraph_mode`

On the host the engine runs in this very process. vLLM takes Triton for missing on a machine without a GPU unless it knows a
backend for the CPU; for V2 it is given the name of one, which is never called.
"""

import argparse
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.bundles import random_bundle
from tests.parity.program import say
from tests.parity.reference import Reference
from trimtab.attribution.bundle import Bundle, ModelIdentity
from trimtab.server.engine.bundles import register_bundle
from trimtab.server.engine.handshake import prove_llm
from trimtab.server.engine.proof import KEY, verify
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

_parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
_parser.add_argument("runner", choices=("v1", "v2"))
_parser.add_argument("--tokens", type=int, default=6, help="completion tokens of each request")
_parser.add_argument("--cuda", action="store_true")
_parser.add_argument("--graphs", default="NONE", help="vLLM's cudagraph_mode; with --cuda")
_parser.add_argument("--dtype", default="float32")
_parser.add_argument("--tensor-parallel", type=int, default=1)
_parser.add_argument("--drafts", type=int, default=0, help="n-gram speculative decoding, so many tokens at a time")
D_MODEL, N_LAYERS = 96, 3
"""A width that is no power of two."""
PROMPTS = ([1, 17, 5, 9, 33, 2, 8], [3, 3, 60], [4, 40, 41, 7, 19, 20, 21, 22, 23, 24, 25])
SPECIAL = (0, 2, 3, 20)


def model(folder: Path) -> None:
    """A random Llama, whose blocks matter as much as its embedding does, and a tokenizer that knows `SPECIAL`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=D_MODEL,
        intermediate_size=128,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4 if "embed" in name else 0.15)
    made.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    words.add_special_tokens([f"w{i}" for i in SPECIAL])
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)


def bundles() -> dict[str, Bundle]:
    identity = ModelIdentity(
        id="tiny",
        architecture="LlamaForCausalLM",
        d_model=D_MODEL,
        n_layers=N_LAYERS,
        fingerprint="sha256:any",
        tokenizer="sha256:any",
    )
    return {f"l{i}": random_bundle(identity, name=f"l{i}", layer=i, seed=i, resid_norm=8.0) for i in (0, 2)}


def plans(found: dict[str, Bundle]) -> list[Plan | None]:
    """Each operation, in each scope, at one layer and at two; gates of both kinds, special tokens left alone; and none."""

    def plan(*edits: dict[str, Any]) -> Plan:
        return compile_plan(parse_steering({"edits": list(edits)}), found)

    add = {"bundle": "l0", "latent": 7, "operation": "add", "amount": 0.7, "unit": "resid_norm"}
    clamp = {"bundle": "l2", "latent": 9, "operation": "clamp", "target": 0.6, "unit": "resid_norm"}
    ablate = {"bundle": "l0", "latent": 8, "operation": "ablate"}
    scale = {"bundle": "l2", "latent": 8, "operation": "scale", "factor": 5.0}
    project = {"bundle": "l2", "vector": "mean", "operation": "project"}
    return [
        None,
        plan(add),
        plan(add, clamp | {"scope": {"tokens": "completion"}}),
        plan(clamp, ablate, scale, project | {"scope": {"tokens": "prompt", "first_token": True}}),
        plan(add | {"scope": {"window": {"start": 2, "stop": 6}}}, project),
        plan(add | {"gate": {"latent": 9, "above": 0.1}}, clamp | {"scope": {"exclude_special": True}}),
        plan(
            add | {"gate": {"latent": 8, "above": 0.3, "mode": "onward"}, "scope": {"exclude_special": True}},
            scale | {"gate": {"latent": 7, "above": 0.5, "mode": "onward"}, "scope": {"tokens": "completion"}},
        ),
    ]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Steered and unsteered requests in one batch, prefilled in chunks, beside transformers."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model(folder)
        found = bundles()
        llm = LLM(
            model=str(folder),
            dtype=options.dtype,
            enforce_eager=options.graphs == "NONE",
            compilation_config={"cudagraph_mode": options.graphs},
            tensor_parallel_size=options.tensor_parallel,
            max_model_len=128,
            max_num_seqs=16,
            max_num_batched_tokens=32,
            block_size=32,
            num_gpu_blocks_override=64,
            additional_config={"trimtab": {"graphs": True}},
            speculative_config=_ngrams(options.drafts) if options.drafts else None,
            async_scheduling=False if options.drafts else None,
        )
        for bundle in found.values():
            register_bundle(llm, bundle)
        report, *_ = prove_llm(llm, [bundle.content_hash for bundle in found.values()])
        asked = [(prompt, plan) for prompt in PROMPTS for plan in plans(found)]
        sampling = [
            SamplingParams(
                temperature=0.0,
                max_tokens=options.tokens,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                extra_args={KEY: plan.wire()} if plan else None,
            )
            for _, plan in asked
        ]
        prompts: Any = [{"prompt_token_ids": prompt} for prompt, _ in asked]
        outputs: list[Any] = llm.generate(prompts, sampling, use_tqdm=False)
        reference, by_hash = Reference(folder), {bundle.content_hash: bundle for bundle in found.values()}
        worst = {True: 0.0, False: 0.0}
        norms, same, changed, firings, special = 0.0, True, 0, 0, 0
        for (prompt, plan), output in zip(asked, outputs, strict=True):
            sample = output.outputs[0]
            tokens = list(sample.token_ids)
            expected = reference(plan, by_hash, prompt, tokens)
            same &= expected.tokens == tokens
            got = [step[token].logprob for step, token in zip(sample.logprobs, tokens, strict=True)]
            apart = (abs(a - b) for a, b in zip(got, expected.logprobs, strict=True))
            worst[plan is not None] = max(worst[plan is not None], *apart)
            if plan is None:
                continue
            proof = output.kv_transfer_params[KEY]
            verify(plan, proof, len(prompt), [options.tokens])
            for layer, edited in expected.layers.items():
                point = proof["hook_points"][f"blocks.{layer}.resid_post"]
                norms = max(norms, abs(point["max_relative_norm"] - edited.max_relative_norm))
                told = (point["gate_firings"], point["special_tokens"])
                if told != (edited.gate_firings, edited.special_tokens):
                    raise SystemExit(f"layer {layer} of {prompt}: {told} gate firings and special tokens, not {edited}")
                firings, special = firings + told[0], special + told[1]
            plain = reference(None, {}, prompt, tokens).logprobs
            changed += max(abs(a - b) for a, b in zip(got, plain, strict=True)) > 0.01
        return {
            "runner": report["runner"],
            "computed_by": report["computed_by"],
            "requests": len(asked),
            "same": same,
            "worst_steered": worst[True],
            "worst_unsteered": worst[False],
            "norms": norms,
            "changed": changed,
            "gate_firings": firings,
            "special_tokens": special,
        }


def _ngrams(n: int) -> dict[str, Any]:
    return {"method": "ngram", "num_speculative_tokens": n, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def prepare(options: argparse.Namespace) -> None:
    """The environment of this process, before vLLM is imported."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_USE_V2_MODEL_RUNNER": str(int(options.runner == "v2"))}
    if options.cuda:
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if options.runner == "v2":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("Triton decides when it is imported: start this with TRITON_INTERPRET=1")
        from triton.backends import backends

        backends["cpu"] = SimpleNamespace(driver=None, compiler=None)


if __name__ == "__main__":
    given = _parser.parse_args()
    prepare(given)
    say(compare(given))
