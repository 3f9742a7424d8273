"""Model diffing, the older two-step method: which latents of one SAE fire more in one model than in another, on the same text.

The score of a latent is its mean activation in the model that is attributed minus that in the other one, over the tokens of the
scope of every completion of a pair, SAE units. It predicts no edit; it stands beside the scores that do.

Axes: D d_model, L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.attribution.errors import ModelError
from trimtab.attribution.gradients import SINK_NORM, batches, positions
from trimtab.attribution.model import SplitModel, pad

if TYPE_CHECKING:
    from trimtab.attribution.gradients import Scope
    from trimtab.attribution.pairs import Completion
    from trimtab.attribution.sae import SAE

__all__ = ["difference", "mean_activation"]


def difference(
    model: SplitModel, other: SplitModel, completions: Sequence[Completion], sae: SAE, scope: Scope, resid_norm: float
) -> Tensor:
    """Mean activation [L] in `model` minus that in `other`.

    Raises:
        ModelError: the two models do not share width or tokenizer.
    """
    for field in ("d_model", "tokenizer"):
        mine, theirs = getattr(model.identity, field), getattr(other.identity, field)
        if mine != theirs:
            raise ModelError(
                f"{other.identity.id} has {field} {theirs} and {model.identity.id} has {mine}; "
                "model diffing compares a model with the one it was fine-tuned from"
            )
    return mean_activation(model, completions, sae, scope, resid_norm) - mean_activation(
        other, completions, sae, scope, resid_norm
    )


def mean_activation(
    model: SplitModel, completions: Sequence[Completion], sae: SAE, scope: Scope, resid_norm: float
) -> Tensor:
    """Mean activation [L] over the tokens of the scope, sinks left out, fp64."""
    total_L = torch.zeros(sae.d_sae, dtype=torch.float64, device=model.device)
    n_tokens = 0
    for batch in batches(completions):
        h_BTD = model.lower(pad([completions[i] for i in batch]))
        rows = [h_BTD[row, positions(completions[i], scope)] for row, i in enumerate(batch)]
        h_ND = torch.cat(rows).float()
        h_ND = h_ND[torch.linalg.vector_norm(h_ND, dim=-1) <= SINK_NORM * resid_norm]
        active = sae.active(h_ND)
        total_L.index_add_(0, active.latent, active.phi.double())
        n_tokens += len(h_ND)
    return total_L / max(n_tokens, 1)
