"""LoRA beside steering: a batch with and without adapter, with and without edits, beside transformers with the adapter merged."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.parity.architectures.compare import PROMPTS, Asked, ask, bundles, plans, start
from tests.parity.architectures.zoo import ZOO

__all__ = ["Lora", "lora"]

RANK, ALPHA = 4, 16
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


class Lora(NamedTuple):
    """What was found of one mixed batch and of each of its requests alone."""

    requests: dict[str, int]
    """How many requests had an adapter, an edit, both, neither."""
    same: bool
    """Whether all greedy tokens are those of transformers with the adapter merged and the edit hooked."""
    alone_same: bool
    """Whether each request has the tokens that it has alone."""
    error: float
    """Largest |Δ log-probability| from transformers."""
    adapter_effect: float
    """Of the adapter, on unsteered requests: the largest |Δ log-probability| from transformers without it."""
    edit_effect: float
    """Of the edit that moves the log-probabilities under the adapter least."""


def lora() -> Lora:
    """Every prompt with and without the adapter under every plan, and under none, in one batch; then each request alone."""
    from vllm.lora.request import LoRARequest

    with start("lora", ZOO["llama"], enable_lora=True, max_loras=2, max_lora_rank=8, max_num_seqs=64) as engine:
        reference = engine.reference
        adapter = engine.folder / "adapter"
        change = _save(adapter, reference.model)
        request = LoRARequest("tiny", 1, str(adapter))
        found = bundles(engine)
        asked = [Asked(prompt, plan, who) for prompt in PROMPTS for plan in plans(found) for who in (None, request)]
        mixed = ask(engine.llm, asked)
        alone = [ask(engine.llm, [one])[0] for one in asked]
    by_hash = {bundle.content_hash: bundle for bundle in found.values()}
    error, adapter_effect, same = 0.0, 0.0, True
    edit_effects: dict[str, float] = {}
    kinds = {"neither": 0, "edit": 0, "adapter": 0, "both": 0}
    for one, answer in zip(asked, mixed, strict=True):
        with _merged(reference.model, change if one.lora else {}):
            expected = reference(one.plan, by_hash, one.prompt, answer.tokens)
            unsteered = reference(None, {}, one.prompt, answer.tokens)
        plain = reference(one.plan, by_hash, one.prompt, answer.tokens)
        same &= expected.tokens == answer.tokens
        error = max(error, answer.apart(expected.logprobs))
        match one.plan, one.lora:
            case None, None:
                kinds["neither"] += 1
            case None, _:
                kinds["adapter"] += 1
                adapter_effect = max(adapter_effect, answer.apart(plain.logprobs))
            case plan, None:
                kinds["edit"] += 1
            case plan, _:
                kinds["both"] += 1
                edit_effects[plan.hash] = max(edit_effects.get(plan.hash, 0.0), answer.apart(unsteered.logprobs))
    alone_same = [answer.tokens for answer in mixed] == [answer.tokens for answer in alone]
    return Lora(kinds, same, alone_same, error, adapter_effect, min(edit_effects.values()))


def _save(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Write a random adapter as PEFT does; what it adds to each weight."""
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    change: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS and isinstance(module, nn.Linear):
            a = torch.randn(RANK, module.in_features, generator=generator) * module.in_features**-0.5
            b = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            change[f"{name}.weight"] = ALPHA / RANK * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return change


@contextmanager
def _merged(model: nn.Module, change: dict[str, Tensor]) -> Iterator[None]:
    """The model with `change` added to its weights."""
    before = {name: model.get_parameter(name).data for name in change}
    for name, added in change.items():
        model.get_parameter(name).data = before[name] + added
    try:
        yield
    finally:
        for name, data in before.items():
            model.get_parameter(name).data = data
