"""A tiny random Llama of four layers, with a tokenizer and bundles of its own: small enough for several workers on two cores."""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.parity.strategies import steerings
from trimtab.attribution.bundle import (
    Bundle,
    Header,
    LatentRecord,
    ModelIdentity,
    RecommendedEdit,
    SAEIdentity,
    VectorRecord,
)
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

__all__ = ["N_LAYERS", "SPECIAL", "bundle", "bundles", "cases", "plan", "save"]

D_MODEL, N_LAYERS, N_LATENTS, N_WORDS = 64, 4, 6, 256
RESID_NORM = 12.0
LONGEST = 70
MODEL = ModelIdentity(
    id="tiny",
    architecture="LlamaForCausalLM",
    d_model=D_MODEL,
    n_layers=N_LAYERS,
    fingerprint="sha256:any",
    tokenizer="sha256:any",
)
SPECIAL = {0, 1, 2}
"""Ids of `<s>`, `</s>` and `<turn>`."""


def save(folder: Path) -> None:
    """The model as an HF folder. Heads divide by 2; its blocks matter as much as its embedding, and no choice is near a tie."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=N_WORDS,
        hidden_size=D_MODEL,
        intermediate_size=128,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name else 0.18)
    model.save_pretrained(folder)
    words = ["<s>", "</s>", "<turn>", *(f"w{i}" for i in range(3, N_WORDS))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<turn>"]
    )
    fast.save_pretrained(folder)


@lru_cache
def bundles() -> dict[str, Bundle]:
    """A bundle for each layer."""
    return {f"l{layer}": bundle(layer) for layer in range(N_LAYERS)}


def bundle(layer: int, model: ModelIdentity = MODEL) -> Bundle:
    """Random rows that fire on real activations; a server asks for the identity of its own model."""
    rng = np.random.default_rng(layer)
    decoder = rng.standard_normal((N_LATENTS, D_MODEL)).astype(np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    encoder = (0.9 * decoder + 0.02 * rng.standard_normal(decoder.shape)).astype(np.float32)
    vectors = rng.standard_normal((2, D_MODEL)).astype(np.float32)
    header = Header(
        name=f"l{layer}",
        behaviour="random rows, for several ranks",
        created="2026-11-25T00:00:00Z",
        model=model,
        sae=SAEIdentity(id="random", digest="sha256:random", d_sae=1000),
        layer=layer,
        resid_norm=RESID_NORM,
        latents=tuple(LatentRecord(latent=100 + i, attribution=0.1, max_activation=3.0) for i in range(N_LATENTS)),
        vectors=tuple(
            VectorRecord(name=v, source="random", norm=float(np.linalg.norm(vectors[i]))) for i, v in enumerate("uv")
        ),
        edits=(
            RecommendedEdit(latent=100, operation="add", amount=0.3, unit="resid_norm"),
            RecommendedEdit(latent=101, operation="clamp", amount=1.5, unit="max_act", scope="completion"),
        ),
    )
    return Bundle(
        header,
        decoder=decoder,
        encoder=encoder,
        bias=np.full(N_LATENTS, -0.1, np.float32),
        threshold=np.linspace(0, 0.4, N_LATENTS, dtype=np.float32),
        baseline=rng.standard_normal(N_LATENTS).astype(np.float32),
        vectors=vectors,
    )


def plan(*edits: dict[str, Any]) -> Plan:
    """The plan of these edits."""
    return compile_plan(parse_steering({"edits": list(edits)}), bundles())


@lru_cache
def cases(n: int) -> tuple[tuple[tuple[int, ...], Plan | None], ...]:
    """n (prompt, plan) requests over the whole edit language, drawn from a fixed seed; every fourth is unsteered company.

    Prompts have 1 to `LONGEST` tokens, as many short as long: Hypothesis would draw nearly all shorter than a cache block.
    """
    drawn: list[tuple[tuple[int, ...], Plan | None]] = []
    rng = random.Random(0)

    def keep(steering: dict[str, Any]) -> None:
        found = compile_plan(parse_steering(steering), bundles())
        if len(drawn) < n and found.rows:
            prompt = tuple(rng.randrange(N_WORDS) for _ in range(rng.randint(1, LONGEST)))
            drawn.append((prompt, found))
            if len(drawn) % 4 == 3 and len(drawn) < n:
                drawn.append((prompt, None))

    settings(
        max_examples=2 * n,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(steerings(bundles(), conditional=True))(keep))()
    return tuple(drawn)
