"""The table of verified decoder layers: where the residual stream is in what a layer of each class returns.

    pair     (hidden, residual): the stream is hidden + residual (vLLM's fused add-and-norm layers)
    single   one tensor [rows, d_model]: it is the stream
    decoy    a tuple whose first is already the stream; the second is stale
    alone    (hidden, None): the first is the stream
    batched  one tensor [1, rows, d_model]: it is the stream (layers of transformers, run by vLLM's transformers backend)

Adding Δ to the first tensor is right for every kind; the kind says what is *read*. Every entry was verified by parity with
transformers on a tiny random model, and by measuring it (`measurement`). Figures, and how to add an entry:
docs/architectures.md.
"""

from typing import Literal

__all__ = ["KINDS", "NOT_ONE_STREAM", "SCALED_IN_FP16", "Kind"]

Kind = Literal["pair", "single", "decoy", "alone", "batched"]

_VLLM = "vllm.model_executor.models."
_HF = "transformers.models."

KINDS: dict[str, Kind] = {
    _VLLM + "commandr.CohereDecoderLayer": "decoy",
    _VLLM + "deepseek_v2.DeepseekV2DecoderLayer": "pair",
    _VLLM + "exaone4.Exaone4DecoderLayer": "decoy",
    _VLLM + "falcon.FalconDecoderLayer": "single",
    _VLLM + "gemma.GemmaDecoderLayer": "pair",
    _VLLM + "gemma2.Gemma2DecoderLayer": "pair",
    _VLLM + "gemma3.Gemma3DecoderLayer": "pair",
    _VLLM + "gemma4.Gemma4DecoderLayer": "alone",
    _VLLM + "glm4.Glm4DecoderLayer": "pair",
    _VLLM + "gpt2.GPT2Block": "single",
    _VLLM + "gpt_oss.TransformerBlock": "pair",
    _VLLM + "granite.GraniteDecoderLayer": "single",
    _VLLM + "granitemoe.GraniteMoeDecoderLayer": "single",
    _VLLM + "llama.LlamaDecoderLayer": "pair",
    _VLLM + "mistral.MistralDecoderLayer": "pair",
    _VLLM + "mixtral.MixtralDecoderLayer": "pair",
    _VLLM + "opt.OPTDecoderLayer": "single",
    _VLLM + "qwen2.Qwen2DecoderLayer": "pair",
    _VLLM + "qwen2_moe.Qwen2MoeDecoderLayer": "pair",
    _VLLM + "qwen3.Qwen3DecoderLayer": "pair",
    _VLLM + "qwen3_moe.Qwen3MoeDecoderLayer": "pair",
    _VLLM + "stablelm.StablelmDecoderLayer": "decoy",
    _HF + "glm.modeling_glm.GlmDecoderLayer": "batched",
    _HF + "gpt_neox.modeling_gpt_neox.GPTNeoXLayer": "batched",
    _HF + "olmo2.modeling_olmo2.Olmo2DecoderLayer": "batched",
    _HF + "phi.modeling_phi.PhiDecoderLayer": "batched",
    _HF + "smollm3.modeling_smollm3.SmolLM3DecoderLayer": "batched",
    _HF + "starcoder2.modeling_starcoder2.Starcoder2DecoderLayer": "batched",
}
"""Class of a decoder layer → kind."""

SCALED_IN_FP16 = frozenset({_VLLM + "deepseek_v2.DeepseekV2DecoderLayer"})
"""Classes that divide the whole stream by a constant when they run in fp16."""

_STREAMS = (
    "its layers carry several streams side by side, and a bundle's rows fit none of them; no release serves it yet"
)

NOT_ONE_STREAM: dict[str, str] = {
    _VLLM + "gemma3n.Gemma3nDecoderLayer": f"AltUp: {_STREAMS}",
}
"""Class of a decoder layer that cannot be steered → why."""
