"""One architecture: vLLM with edits beside transformers with hooks, and the kind of its layers by the table and as measured."""

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.bundles import random_bundle
from tests.parity.architectures.model import save
from tests.parity.architectures.zoo import ZOO, Tiny
from tests.parity.reference import Reference
from trimtab.attribution.bundle import Bundle, ModelIdentity
from trimtab.server.engine.bundles import register_bundle
from trimtab.server.engine.handshake import measure_llm, prove_llm
from trimtab.server.engine.kinds import KINDS
from trimtab.server.engine.proof import KEY, verify
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

__all__ = [
    "PROMPTS",
    "Answer",
    "Asked",
    "Finding",
    "Started",
    "ask",
    "bundles",
    "compare",
    "plans",
    "start",
]

N_TOKENS = 6
PROMPTS = ([1, 17, 5, 9, 33, 2, 8], [3, 3, 60], [4, 40, 41, 7, 19, 20, 21, 22, 23, 24, 25])
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 64,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "num_gpu_blocks_override": 256,
    "disable_log_stats": True,
}


class Finding(NamedTuple):
    """What was found of one architecture."""

    name: str
    """In the zoo."""
    architecture: str
    """In config.json."""
    kinds: dict[str, str]
    """Class of its decoder layers → kind in the table."""
    measured: dict[str, list[str | None]]
    """Class → the different kinds that its layers measure as."""
    same: bool
    """Whether all greedy tokens are those of transformers."""
    error: float
    """Largest |Δ log-probability| from transformers, over steered and unsteered requests."""
    unsteered_error: float
    """The same, over unsteered requests."""
    effect: float
    """Of the edit that moves the log-probabilities least: how far it moves them at most."""


class Started(NamedTuple):
    """An engine in this process on a tiny model."""

    llm: Any
    reference: Reference
    folder: Path
    architecture: str
    layers: list[int]
    """That can be steered."""


class Asked(NamedTuple):
    """One request."""

    prompt: list[int]
    plan: Plan | None
    lora: Any = None


class Answer(NamedTuple):
    """What the engine said to it; the proof of a plan has been verified."""

    tokens: list[int]
    logprobs: list[float]

    def apart(self, logprobs: Sequence[float]) -> float:
        """Largest difference from these."""
        return max(abs(x - y) for x, y in zip(self.logprobs, logprobs, strict=True))


@contextmanager
def start(name: str, tiny: Tiny, **flags: Any) -> Iterator[Started]:
    """Start an engine; it has ended when this ends."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with tempfile.TemporaryDirectory(prefix=f"{name}-") as temporary:
        folder = Path(temporary)
        architecture = save(tiny.config(), folder)
        _known_here(architecture)
        reference = Reference(folder)
        for module in reference.model.modules():  # vLLM's transformers backend makes its classes compile themselves.
            module.do_not_compile = True  # type: ignore[assignment]
        llm = LLM(model=str(folder), **{**ENGINE, **tiny.engine, **flags})
        try:
            layers = llm.collective_rpc("trimtab_handshake")[0]["layers"]
            yield Started(llm, reference, folder, architecture, layers)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def compare(name: str) -> Finding:
    """Steered and unsteered requests in one batch, beside transformers.

    Raises:
        Unsupported: trimtab refuses the model.
    """
    with start(name, ZOO[name]) as engine:
        prove_llm(engine.llm)
        measured: dict[str, set[str | None]] = {}
        for reading in measure_llm(engine.llm):
            measured.setdefault(reading.name, set()).add(reading.kind)
        reference = engine.reference
        found = bundles(engine)
        asked = [Asked(prompt, plan) for prompt in PROMPTS for plan in plans(found)]
        answers = ask(engine.llm, asked)
    by_hash = {bundle.content_hash: bundle for bundle in found.values()}
    same, error, unsteered_error, effects = True, 0.0, 0.0, dict[str, float]()
    for (prompt, plan, _), answer in zip(asked, answers, strict=True):
        expected = reference(plan, by_hash, prompt, answer.tokens)
        same &= expected.tokens == answer.tokens
        error = max(error, answer.apart(expected.logprobs))
        if plan is None:
            unsteered_error = max(unsteered_error, answer.apart(expected.logprobs))
        else:
            unsteered = reference(None, {}, prompt, answer.tokens).logprobs
            effects[plan.hash] = max(effects.get(plan.hash, 0.0), answer.apart(unsteered))
    return Finding(
        name,
        engine.architecture,
        {layer: KINDS[layer] for layer in measured},
        {layer: sorted(kinds, key=str) for layer, kinds in measured.items()},
        same,
        error,
        unsteered_error,
        min(effects.values()),
    )


def plans(bundles: dict[str, Bundle]) -> list[Plan | None]:
    """None, and edits that read the stream (clamp, scale, project, a gate) and write it, at three layers."""
    first, middle, last = bundles

    def plan(*edits: dict[str, Any]) -> Plan:
        return compile_plan(parse_steering({"edits": list(edits)}), bundles)

    add = {"latent": 7, "operation": "add", "amount": 0.7, "unit": "resid_norm"}
    clamp = {"latent": 9, "operation": "clamp", "target": 0.6, "unit": "resid_norm"}
    scale = {"latent": 8, "operation": "scale", "factor": 6.0}
    project = {"vector": "mean", "operation": "project"}
    completion = {"scope": {"tokens": "completion"}}
    gate = {"gate": {"latent": 8, "above": 0.02}}
    return [
        None,
        plan(add | {"bundle": first}),
        plan(clamp | {"bundle": middle}),
        plan(scale | {"bundle": first}, project | {"bundle": last}),
        plan(clamp | {"bundle": first}, clamp | {"bundle": last} | completion),
        plan(add | {"bundle": middle} | gate, scale | {"bundle": last}),
    ]


def bundles(engine: Started) -> dict[str, Bundle]:
    """Random rows at the first, a middle and the last layer, in units of the stream's own length there; the engine has them."""
    layers, reference = engine.layers, engine.reference
    norms: dict[int, float] = {}
    handles = []
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):

        def keep(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            h_TD = (output[0] if isinstance(output, tuple) else output)[0]
            norms[layer] = float(h_TD.norm(dim=-1).mean())

        handles.append(reference.blocks[layer].register_forward_hook(keep))
    with torch.inference_mode():
        reference.model(torch.tensor([PROMPTS[-1]]))
    for handle in handles:
        handle.remove()
    identity = ModelIdentity(
        id="tiny",
        architecture=engine.architecture,
        d_model=reference.model.config.get_text_config().hidden_size,
        n_layers=len(reference.blocks),
        fingerprint="sha256:any",
        tokenizer="sha256:any",
    )
    found = {
        f"l{layer}": random_bundle(identity, name=f"l{layer}", layer=layer, seed=layer, resid_norm=norm)
        for layer, norm in sorted(norms.items())
    }
    for bundle in found.values():
        register_bundle(engine.llm, bundle)
    return found


def ask(llm: Any, asked: Sequence[Asked]) -> list[Answer]:
    """Greedy answers, from one batch."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=N_TOKENS,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args={KEY: one.plan.wire()} if one.plan else None,
        )
        for one in asked
    ]
    prompts = [{"prompt_token_ids": one.prompt} for one in asked]
    loras = [one.lora for one in asked] if any(one.lora for one in asked) else None
    answers = []
    for one, output in zip(asked, llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras), strict=True):
        sample = output.outputs[0]
        tokens = list(sample.token_ids)
        if one.plan is not None:
            verify(one.plan, output.kv_transfer_params[KEY], len(one.prompt), [N_TOKENS])
        answers.append(
            Answer(tokens, [step[token].logprob for step, token in zip(sample.logprobs, tokens, strict=True)])
        )
    return answers


def _known_here(architecture: str) -> None:
    """vLLM inspects a model class in a process of its own, which takes long to start, unless it was imported here."""
    from vllm.model_executor.models import ModelRegistry

    if (lazy := ModelRegistry.models.get(architecture)) is not None:
        ModelRegistry.register_model(architecture, lazy.load_model_cls())
