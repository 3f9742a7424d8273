"""The small real things of this room's tests: an SAE of a few latents, passes over a few tokens, a Llama of a few weights.

They are no mocks: the code under test runs on them as on large ones, in milliseconds, and what it should give can be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trimtab.attribution.gradients import Factors
from trimtab.attribution.sae import SAE


def sae_of(d: Tensor, theta: float = 0.0, layer: int = 0) -> SAE:
    """An SAE whose encoder rows are its decoder rows."""
    n = len(d)
    return SAE("tiny", "sha256:tiny", layer, d.clone(), torch.zeros(n), torch.full((n,), theta), d, None, {})


def factors_of(*completions: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]) -> Factors:
    """(a, g) of positive, negative, positive, … as one pass."""
    a, g = ([torch.tensor(part[i], dtype=torch.float32) for part in completions] for i in (0, 1))
    return Factors(torch.cat(a), torch.cat(g), torch.tensor([i for i, part in enumerate(a) for _ in part]))


def random_factors(n_pairs: int, d_model: int, seed: int) -> Factors:
    """Random completions of 5, 6, 7 … tokens."""
    generator = torch.Generator().manual_seed(seed)
    of = torch.tensor([i for i in range(2 * n_pairs) for _ in range(5 + i)])
    a, g = (torch.randn(len(of), d_model, generator=generator) for _ in range(2))
    return Factors(a, g, of)


def passes_of(factors: Factors, size: int) -> list[Factors]:
    """The same, `size` completions a pass, the last ones first."""
    n = int(factors.of_N.max()) + 1
    return [
        Factors(*(t[(factors.of_N >= start) & (factors.of_N < start + size)] for t in factors))
        for start in reversed(range(0, n, size))
    ]


def llama(folder: Path, *, seed: int = 0, n_layers: int = 4, d_model: int = 32) -> Path:
    """A random Llama with a tokenizer of bytes, as an HF folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
