"""What is known about an SAE's latents from text: mean activation, typical norm, densities, largest activations.

They come from `stats.safetensors` beside the SAE's weights, measured on its own held-out text; for an SAE that ships none they
are measured on the run's held-out pairs, and the bundle says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trimtab.attribution.errors import SAEError
from trimtab.attribution.gradients import SINK_NORM, batches, positions
from trimtab.attribution.model import SplitModel, pad
from trimtab.attribution.pairs import Completion

if TYPE_CHECKING:
    from trimtab.attribution.sae import SAE

__all__ = ["Stats", "measure_stats", "read_stats", "residuals"]


@dataclass(frozen=True)
class Stats:
    """What was measured on text that is neither train nor held-out pairs, sinks masked."""

    mean_D: Tensor
    """Mean activation ā of the residual stream."""
    resid_norm: float
    """Median ‖h‖."""
    density_L: Tensor
    """Fraction of tokens on which each latent fires, mean of text and chat."""
    max_activation_L: Tensor
    """Largest activation of each latent, SAE units."""
    source: str
    """Where the numbers come from, for people."""

    def on(self, device: torch.device) -> Stats:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("mean_D", "density_L", "max_activation_L")}
        return replace(self, **moved)

    def narrowed(self, latents: Tensor) -> Stats:
        """Those of some latents alone."""
        return replace(self, density_L=self.density_L[latents], max_activation_L=self.max_activation_L[latents])


def read_stats(folder: Path, n_latents: int, d_model: int) -> Stats | None:
    """The stats beside an SAE; None where there are none.

    Raises:
        SAEError: the file is damaged or belongs to another SAE.
    """
    file = folder / "stats.safetensors"
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
        stats = Stats(
            mean_D=tensors["mean_activation_vector"].float(),
            resid_norm=float(tensors["median_norm"]),
            density_L=(tensors["density_text"].float() + tensors["density_chat"].float()) / 2,
            max_activation_L=tensors["max_activation"].float(),
            source=f"{file.name} of the SAE (its own held-out text)",
        )
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as e:
        raise SAEError(f"{file} is damaged or lacks a tensor ({e}); fetch it again, or remove it") from e
    if stats.mean_D.shape != (d_model,) or stats.density_L.shape != (n_latents,):
        raise SAEError(f"{file} belongs to an SAE of another shape; fetch it again, or remove it")
    return stats


@torch.no_grad()
def residuals(model: SplitModel, completions: Sequence[Completion]) -> tuple[Tensor, float]:
    """The stream [N, D] at every token of the completions but the sinks, and the median norm."""
    parts = []
    for batch in batches(completions):
        h_BTD = model.lower(pad([completions[i] for i in batch]))
        parts += [h_BTD[row, positions(completions[i], "all")] for row, i in enumerate(batch)]
    h_ND = torch.cat(parts).float()
    norm_N = torch.linalg.vector_norm(h_ND, dim=-1)
    median = float(norm_N.median())
    return h_ND[norm_N <= SINK_NORM * median], median


def measure_stats(sae: SAE, h_ND: Tensor, resid_norm: float) -> Stats:
    """Stats over what `residuals` gives."""
    _, latent, phi = sae.active(h_ND)
    return Stats(
        mean_D=h_ND.mean(0),
        resid_norm=resid_norm,
        density_L=torch.bincount(latent, minlength=sae.d_sae) / len(h_ND),
        max_activation_L=phi.new_zeros(sae.d_sae).scatter_reduce_(0, latent, phi, "amax"),
        source=f"{len(h_ND)} tokens of the held-out pairs, as the SAE folder has no stats.safetensors",
    )
