"""What is trained: every setting of the run, and the folder its artefacts live in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.attribution.embedded import EMBEDDED_MODEL, cache_dir
from trimtab.attribution.training.corpus import HELD_OUT_ONE_IN, MAX_TOKENS
from trimtab.attribution.training.sources import WHEEL_SHA256

__all__ = ["HOOK_NAME", "LAYER", "DataPlan", "TrainPlan", "data_folder", "shipped_folder", "train_folder"]

LAYER = 14
HOOK_NAME = f"blocks.{LAYER}.hook_resid_post"


@dataclass(frozen=True)
class DataPlan:
    """What the model reads."""

    text_tokens: int = 800_000
    dialogue_tokens: int = 480_000
    more_text_tokens: int = 120_000
    """Text and dialogue beyond the above, in shards of their own: the first ones stay as they were cached."""
    more_dialogue_tokens: int = 100_000
    n_samples: int = 672
    max_new_tokens: int = 120
    seed: int = 7


@dataclass(frozen=True)
class TrainPlan:
    """How the SAE is fitted."""

    n_latents: int = 8192
    k: int = 58
    """Latents active per token, on average over a batch (BatchTopK)."""
    k_first: int = 230
    """`k` of the first step, falling evenly to `k`: all latents learn something before they compete."""
    k_falls: int = 120
    """Steps in which it falls."""
    batch: int = 2048
    """Tokens per step."""
    steps: int = 4200
    lr: float = 1e-3
    warmup: int = 50
    """Steps of linear warm-up."""
    decay: float = 0.3
    """Last part of the run in which the learning rate falls to 0."""
    encoder_gain: float = 0.045
    """Encoder at the start: this times the decoder's transpose."""
    aux_k: int = 32
    """Silent latents asked to explain the error, per token."""
    aux_weight: float = 1 / 32
    silent_after: int = 60
    """Steps without firing after which a latent counts as silent."""
    revive_every: int = 5
    """Steps between two revivals of silent latents, until the learning rate decays."""
    revive: int = 256
    """Most latents revived at a time."""
    seed: int = 7


def data_folder(plan: DataPlan) -> Path:
    """Where the samples and activations of `plan` live."""
    key = {**asdict(plan), "wheel": WHEEL_SHA256, "max_tokens": MAX_TOKENS, "held_out": HELD_OUT_ONE_IN, "layer": LAYER}
    return cache_dir() / "sae" / f"data-{_digest(key)}"


def train_folder(data: DataPlan, plan: TrainPlan) -> Path:
    """Where the checkpoints of `plan` on `data` live."""
    return data_folder(data) / f"train-{_digest(asdict(plan))}"


def shipped_folder() -> Path:
    """Where the SAE goes that is shipped in the package."""
    return Path(__file__).parent.parent / "saes" / EMBEDDED_MODEL / HOOK_NAME


def _digest(key: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
