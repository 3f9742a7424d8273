"""A tiny random model of any architecture, as an ordinary Hugging Face folder without a tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

__all__ = ["save"]


def save(config: Any, folder: Path) -> str:
    """Write the model that `config` describes, in fp32; its architecture's name.

    Every weight is drawn anew, so that each block matters as much as the embedding does, norms and biases included.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            elif "emb" in name or name.endswith("wte.weight"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.2 * parameter.shape[-1] ** -0.5 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma 4: 1 until a checkpoint says otherwise.
                buffer.fill_(0.8)
    model.save_pretrained(folder)
    return type(model).__name__
