"""The SAE as it is shipped: JumpReLU, one latent readable alone, in SAELens v6's folder format.

    z = h W_enc + b_enc        a = z where z > threshold, else 0        ĥ = a W_dec + b_dec

BatchTopK compares a token's latents with the rest of its batch, so it cannot read one latent alone. Training's scaling and
centring are folded into the weights: `h` is the raw residual stream. W_enc and W_dec are stored in fp16, the rest in fp32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.attribution.training.corpus import MAX_TOKENS
from trimtab.attribution.training.dictionary import batch_top_k
from trimtab.attribution.training.plan import HOOK_NAME, LAYER
from trimtab.attribution.training.train import Run

__all__ = ["JumpReLU", "calibrate", "fold"]

WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"


@dataclass(frozen=True)
class JumpReLU:
    """SAELens' names and shapes."""

    W_enc: torch.Tensor
    """[D, L]."""
    W_dec: torch.Tensor
    """[L, D], rows of norm 1."""
    b_enc: torch.Tensor
    b_dec: torch.Tensor
    threshold: torch.Tensor
    """[L]."""

    def preactivations(self, h_TD: torch.Tensor) -> torch.Tensor:
        """z [T, L]."""
        return torch.addmm(self.b_enc, h_TD, self.W_enc)

    def encode(self, h_TD: torch.Tensor) -> torch.Tensor:
        """a [T, L]."""
        z_TL = self.preactivations(h_TD)
        return z_TL * (z_TL > self.threshold)

    def decode(self, a_TL: torch.Tensor) -> torch.Tensor:
        """ĥ [T, D]."""
        return torch.addmm(self.b_dec, a_TL, self.W_dec)

    def save(self, folder: Path) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architecture": "jumprelu",
            "d_in": self.W_enc.shape[0],
            "d_sae": self.W_enc.shape[1],
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "model_name": EMBEDDED_MODEL,
                "hook_name": HOOK_NAME,
                "hf_hook_name": f"model.layers.{LAYER}",
                "hook_layer": LAYER,
                "hook_head_index": None,
                "prepend_bos": False,
                "context_size": MAX_TOKENS,
                "training_architecture": "batchtopk",
            },
        }
        tensors = {name: value.contiguous() for name, value in vars(self).items()}
        for name in ("W_enc", "W_dec"):
            tensors[name] = tensors[name].half()
        partial = folder / f"{WEIGHTS}.part"
        save_file(tensors, partial)
        partial.chmod(0o644)  # safetensors writes for the owner alone.
        partial.rename(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> JumpReLU:
        """What `save` wrote, in fp32."""
        return cls(**{name: value.float() for name, value in load_file(folder / WEIGHTS).items()})


def fold(run: Run, threshold: float) -> JumpReLU:
    """The trained dictionary on the raw stream: with x = (h − mean) / s, a latent's raw activation is s times its scaled one."""
    dictionary, s = run.dictionary, run.scale
    return JumpReLU(
        W_enc=dictionary.W_enc.T.contiguous(),
        W_dec=dictionary.W_dec,
        b_enc=s * dictionary.b_enc - dictionary.W_enc @ run.mean,
        b_dec=run.mean + s * dictionary.b_dec,
        threshold=torch.full_like(dictionary.b_enc, s * threshold),
    )


def calibrate(run: Run, h_TD: torch.Tensor, k: int) -> float:
    """The one threshold, in scaled units, at which k latents per token are active on average over `h_TD`."""
    lowest = []
    for part in torch.split(h_TD, 2048):
        z_TL = run.dictionary.encode((part.float() - run.mean) / run.scale)
        lowest.append(batch_top_k(z_TL, k, run.lowest)[1])
    return sum(lowest) / len(lowest)
