"""A sparse autoencoder read from a SAELens folder: `cfg.json` and `sae_weights.safetensors`. No pickle is ever read.

    φ_i(h) = x if x > θ_i else 0,  x = e_i · h + b_i        ĥ = Σ_i φ_i(h) d_i + b_dec

One threshold covers the known activation functions: 0 is ReLU (`standard`), > 0 is JumpReLU. Where the encoder reads h − b_dec
(`apply_b_dec_to_input`) that is folded into the bias, b_i − e_i · b_dec. What cannot be folded into one row exactly — a
normalisation per token, TopK without a threshold — is refused.

`stats.safetensors` beside the weights, when there, holds the measurements on the SAE's own held-out text (`Stats`).

Axes: T tokens, D d_model, L latents.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trimtab.attribution.edit import Rows
from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.attribution.errors import SAEError
from trimtab.attribution.stats import Stats, read_stats

if TYPE_CHECKING:
    from trimtab.attribution.bundle import ModelIdentity

__all__ = ["SAE", "shipped_sae"]


@dataclass(frozen=True)
class SAE:
    """An SAE in fp32 with its input normalisation folded in."""

    id: str
    digest: str
    """`sha256:…` over configuration and weights."""
    layer: int
    """0-based; reads resid_post of this block."""
    e_LD: Tensor
    b_L: Tensor
    theta_L: Tensor
    d_LD: Tensor
    stats: Stats | None
    top_tokens: dict[int, tuple[str, ...]]
    """Tokens on which a latent fires most, where the folder says so."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.d_LD)

    @classmethod
    def load(cls, folder: Path) -> SAE:
        """Read a SAELens folder.

        Raises:
            SAEError: the folder is incomplete or damaged, its weights are a pickle, or one latent cannot be read alone.
        """
        config, weights = _config(folder), _weights(folder)
        layer = _layer(config, folder)
        architecture = _architecture(config)
        _refuse_unfoldable(config, architecture, weights, folder)
        try:
            W_enc_DL, W_dec_LD = weights["W_enc"].float(), weights["W_dec"].float()
            b_L, b_dec_D = weights["b_enc"].float(), weights["b_dec"].float()
            theta_L = weights["threshold"].float() if "threshold" in weights else torch.zeros_like(b_L)
        except KeyError as e:
            raise SAEError(f"{folder} has no tensor {e}; give a SAELens folder of a standard or jumprelu SAE") from e
        n_latents, d_model = W_dec_LD.shape
        shapes = {"W_enc": W_enc_DL.shape, "b_enc": b_L.shape, "b_dec": b_dec_D.shape, "threshold": theta_L.shape}
        wanted = {"W_enc": (d_model, n_latents), "b_enc": (n_latents,), "b_dec": (d_model,), "threshold": (n_latents,)}
        for name, shape in wanted.items():
            if tuple(shapes[name]) != shape:
                raise SAEError(
                    f"{folder}: {name} is {list(shapes[name])} but W_dec asks for {list(shape)}; fetch the SAE again"
                )
        if _applies_b_dec(config):
            b_L = b_L - b_dec_D @ W_enc_DL
        return cls(
            id=f"{folder.parent.name}/{folder.name}",
            digest=_digest(folder),
            layer=layer,
            e_LD=W_enc_DL.T.contiguous(),
            b_L=b_L,
            theta_L=theta_L,
            d_LD=W_dec_LD,
            stats=read_stats(folder, n_latents, d_model),
            top_tokens=_top_tokens(folder),
        )

    def check_model(self, model: ModelIdentity) -> None:
        """Refuse a model of another shape.

        Raises:
            SAEError: another width, or the hook point is above the model's last block.
        """
        if self.d_LD.shape[1] != model.d_model:
            raise SAEError(
                f"SAE {self.id} has d_in {self.d_LD.shape[1]} but {model.id} has d_model {model.d_model}; "
                "give an SAE that was trained on this model"
            )
        if self.layer >= model.n_layers:
            raise SAEError(f"SAE {self.id} reads block {self.layer} but {model.id} has blocks 0..{model.n_layers - 1}")

    def encode(self, h_TD: Tensor, latents: Tensor | None = None) -> Tensor:
        """Activations [T, L], or those of `latents` alone, SAE units."""
        e_LD, b_L, theta_L = self.e_LD, self.b_L, self.theta_L
        if latents is not None:
            e_LD, b_L, theta_L = e_LD[latents], b_L[latents], theta_L[latents]
        x_TL = torch.addmm(b_L, h_TD, e_LD.T)
        return torch.where(x_TL > theta_L, x_TL, 0.0)

    def rows(self, latents: list[int], alpha_K: Tensor, beta_K: Tensor) -> Rows:
        """The formula's rows that edit `latents`, one row each."""
        return Rows(alpha_K, beta_K, self.e_LD[latents], self.b_L[latents], self.theta_L[latents], self.d_LD[latents])


def shipped_sae() -> Path:
    """The folder of the SAE that ships for the embedded model."""
    return Path(__file__).parent / "saes" / EMBEDDED_MODEL / "blocks.14.hook_resid_post"


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "cfg.json").read_text())
    except OSError as e:
        raise SAEError(f"cannot read {folder / 'cfg.json'}: {e.strerror}; give a SAELens folder") from e
    except ValueError as e:
        raise SAEError(f"{folder / 'cfg.json'} is not JSON ({e}); fetch the SAE again") from e
    if not isinstance(config, dict):
        raise SAEError(f"{folder / 'cfg.json'} is not a JSON object; give a SAELens folder")
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    file = folder / "sae_weights.safetensors"
    if not file.is_file():
        pickles = [p.name for ending in ("*.pt", "*.pth", "*.bin", "*.pkl") for p in sorted(folder.glob(ending))]
        if pickles:
            raise SAEError(f"{folder} holds {pickles[0]}, a pickle, which is never read; save it as {file.name}")
        raise SAEError(f"{folder} holds no {file.name}; give a SAELens folder")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as e:
        raise SAEError(f"{file} is not a whole safetensors file ({e}); fetch it again") from e


def _layer(config: dict[str, Any], folder: Path) -> int:
    metadata = config.get("metadata") or {}
    name = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point") or ""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name)
    if match is None:
        raise SAEError(f"{folder} reads hook point {name!r}; only blocks.N.hook_resid_post can be edited so far")
    return int(match[1])


def _architecture(config: dict[str, Any]) -> str:
    if "architecture" in config:
        return str(config["architecture"])
    return {"relu": "standard"}.get(str(config.get("activation_fn_str", config.get("activation_fn", "relu"))), "topk")


def _applies_b_dec(config: dict[str, Any]) -> bool:
    return bool(config.get("apply_b_dec_to_input", True))  # Older SAELens did not write it, and did it.


def _refuse_unfoldable(config: dict[str, Any], architecture: str, weights: dict[str, Tensor], folder: Path) -> None:
    if architecture in ("topk", "batchtopk") and "threshold" not in weights:
        raise SAEError(
            f"{folder} is a {architecture} SAE, whose latents cannot be read one at a time; "
            "give it a `threshold` per latent and save it as jumprelu"
        )
    if architecture not in ("standard", "jumprelu", "topk", "batchtopk"):
        raise SAEError(f"{folder} has architecture {architecture!r}; standard and jumprelu can be read")
    if architecture == "jumprelu" and "threshold" not in weights:
        raise SAEError(f"{folder} is a jumprelu SAE without a `threshold` tensor; fetch it again")
    normalisation = config.get("normalize_activations") or "none"
    if normalisation != "none":
        raise SAEError(
            f"{folder} was trained with normalize_activations {normalisation!r}, which cannot be folded into one row exactly; "
            "fold it into the weights and save with 'none'"
        )
    if config.get("reshape_activations") not in (None, "none"):
        raise SAEError(
            f"{folder} reshapes its input ({config['reshape_activations']}); only the residual stream can be read"
        )
    if config.get("rescale_acts_by_decoder_norm") and not torch.allclose(
        weights["W_dec"].float().norm(dim=1), torch.ones(len(weights["W_dec"])), atol=1e-2
    ):
        raise SAEError(f"{folder} rescales activations by decoder norms; fold them into the weights and save without")


def _digest(folder: Path) -> str:
    sha = hashlib.sha256((folder / "cfg.json").read_bytes())
    sha.update((folder / "sae_weights.safetensors").read_bytes())
    return "sha256:" + sha.hexdigest()


def _top_tokens(folder: Path) -> dict[int, tuple[str, ...]]:
    file = folder / "top_contexts.jsonl.gz"
    if not file.is_file():
        return {}
    try:
        entries = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
        return {e["latent"]: tuple(dict.fromkeys(token for _, _, token, _ in e["top"])) for e in entries}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as e:
        raise SAEError(f"{file} is damaged ({e}); fetch it again, or remove it") from e
