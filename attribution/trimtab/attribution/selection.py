"""Which latents to report: the leading live ones, without near-duplicates.

The projection score ignores the encoder, so a third of its leaders are latents that never fire and cannot be ablated; and SAE
directions are collinear, so the same direction comes several times. A live latent fires on the SAE's own text *and* on the pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.attribution.errors import SelectionError
from trimtab.attribution.matrix import Matrix

__all__ = ["MAX_COSINE", "leading", "random_live"]

MAX_COSINE = 0.7
"""Of two latents whose directions are closer than this, only the leader is reported."""


def leading(score_L: Tensor, live_L: Tensor, d_LD: Matrix, n: int, max_cosine: float = MAX_COSINE) -> list[int]:
    """The n live latents of highest score, best first, each further than `max_cosine` from all before it.

    Raises:
        SelectionError: no latent is live.
    """
    if not bool(live_L.any()):
        raise SelectionError(
            "no latent fires both on held-out text and on the pairs; check that SAE and model belong together"
        )
    ranked_L = torch.where(live_L, score_L, -torch.inf).argsort(descending=True, stable=True)
    chosen: list[int] = []
    units: list[Tensor] = []
    for latent in ranked_L[: int(live_L.sum())].tolist():
        u_D = torch.nn.functional.normalize(d_LD[latent], dim=0)
        if units and float((torch.stack(units) @ u_D).max()) > max_cosine:
            continue
        chosen.append(latent)
        units.append(u_D)
        if len(chosen) == n:
            break
    return chosen


def random_live(live_L: Tensor, like: list[int], activation_L: Tensor, n: int, seed: int = 0) -> list[int]:
    """n random live latents that are none of `like` but about as active on the pairs: the control.

    Half of the live latents are eligible: those whose mean activation is nearest to the mean of `like`, in logarithm.
    """
    eligible = live_L.clone()
    eligible[like] = False
    candidates = eligible.nonzero().squeeze(1)
    log_C = activation_L[candidates].clamp_min(1e-9).log()
    target = activation_L[like].clamp_min(1e-9).log().mean()
    near = candidates[(log_C - target).abs().argsort(stable=True)[: max(n, len(candidates) // 2)]]
    order = torch.randperm(len(near), generator=torch.Generator().manual_seed(seed))
    return sorted(near[order[:n]].tolist())
