"""A tiny configuration of every architecture in the table, as transformers knows it: complete enough to take every path of its
layers (sliding and full attention, dense and expert layers, shared experts, latent attention, convolutions).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers

__all__ = ["QUICK", "SEVERAL_STREAMS", "ZOO", "Tiny"]


class Tiny(NamedTuple):
    """How to make one tiny model, and what vLLM needs to run it on a CPU."""

    config: Callable[[], Any]
    engine: dict[str, Any]


QUICK = ("gpt2", "cohere", "gemma4", "olmo2", "qwen3_moe")
"""One of each kind, experts among them."""

_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
_GPT: dict[str, Any] = {"vocab_size": 128, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 2}
_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
_SLIDING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}

_ROTARY: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
"""vLLM's CPU kernel for rotary embeddings is wrong where heads are an axis of their own, as latent attention has them; its torch
code, taken instead, is right."""

_NO_EDGE: dict[str, Any] = {"sliding_window": 64}
"""vLLM's Cohere 2 sees one token more through its window than that of transformers: the window is longer than the prompts."""


def _tiny(name: str, *shared: dict[str, Any], **own: Any) -> Tiny:
    """A model of the size of `_SMALL`; `name` is that of its class of configurations, without `Config`."""
    return _exactly(name, _SMALL, *shared, **own)


def _exactly(name: str, *shared: dict[str, Any], **own: Any) -> Tiny:
    """A model of these fields alone; later ones override."""
    fields: dict[str, Any] = {}
    for part in (*shared, own):
        fields |= part
    return Tiny(lambda: getattr(transformers, f"{name}Config")(**fields), {})


ZOO: dict[str, Tiny] = {
    "cohere": _tiny("Cohere", logit_scale=1.0),
    "cohere2": _tiny("Cohere2", logit_scale=1.0, num_hidden_layers=4, **_NO_EDGE),
    "deepseek_v2": _tiny("DeepseekV2", _ROUTED, _LATENT, first_k_dense_replace=1, q_lora_rank=None)._replace(
        engine=_ROTARY
    ),
    "exaone4": _tiny("Exaone4", num_hidden_layers=4, sliding_window=8, sliding_window_pattern=2),
    "falcon": _exactly(
        "Falcon", _TOKENS, vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, alibi=False
    ),
    "gemma": _tiny("Gemma"),
    "gemma2": _tiny("Gemma2", sliding_window=8, query_pre_attn_scalar=32),
    "gemma3": _tiny("Gemma3Text", _SLIDING, query_pre_attn_scalar=32),
    "gemma4": _tiny(
        "Gemma4Text",
        _SLIDING,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
        global_head_dim=64,
    ),
    "glm": _tiny("Glm"),
    "glm4": _tiny("Glm4"),
    "gpt2": _exactly("GPT2", _GPT, _TOKENS),
    "gpt_neox": _exactly(
        "GPTNeoX",
        _TOKENS,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
    ),
    "gpt_oss": _tiny("GptOss", _LOCAL, num_hidden_layers=4, sliding_window=8),
    "granite": _tiny(
        "Granite", residual_multiplier=0.5, embedding_multiplier=2.0, attention_multiplier=0.2, logits_scaling=1.0
    ),
    "granitemoe": _tiny("GraniteMoe", _LOCAL),
    "llama": _tiny("Llama"),
    "mistral": _tiny("Mistral", sliding_window=8),
    "mixtral": _tiny("Mixtral", _LOCAL),
    "olmo2": _tiny("Olmo2"),
    "opt": _exactly(
        "OPT",
        _TOKENS,
        vocab_size=128,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
    ),
    "phi": _tiny("Phi", num_key_value_heads=2, partial_rotary_factor=0.5),
    "phi3": _tiny("Phi3"),
    "qwen2": _tiny("Qwen2"),
    "qwen2_moe": _tiny("Qwen2Moe", _EXPERTS, shared_expert_intermediate_size=64),
    "qwen3": _tiny("Qwen3"),
    "qwen3_moe": _tiny("Qwen3Moe", _EXPERTS),
    "smollm3": _tiny("SmolLM3"),
    "stablelm": _tiny("StableLm", partial_rotary_factor=0.5),
    "starcoder2": _tiny("Starcoder2"),
}
"""Name → tiny model."""

SEVERAL_STREAMS = _tiny(
    "Gemma3nText",
    _SLIDING,
    intermediate_size=[96] * 3,
    vocab_size_per_layer_input=128,
    hidden_size_per_layer_input=16,
    laurel_rank=8,
    num_kv_shared_layers=0,
    activation_sparsity_pattern=[0.0] * 3,
)
"""Gemma 3n, which is refused."""
