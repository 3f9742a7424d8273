"""The first validation: does the edit do what the attribution predicted, on pairs that the attribution never saw?

The measure is the log-probability margin of the positive over the negative completion, mean per token, under the edit minus
without it: an effect below 0 steers away from the behaviour. The residual stream at the hook point is computed once; since an
edit acts there and nowhere below, each edit costs one pass through the upper blocks alone, and is exact.

Teacher-forced margins are cheap and smooth, but sampled text is what a user reads: judge an edit by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.attribution.edit import Rows, delta
from trimtab.attribution.gradients import Scope, batches, losses, positions
from trimtab.attribution.model import SplitModel, pad
from trimtab.attribution.pairs import Completion
from trimtab.attribution.scores import clustered_se

__all__ = ["Effect", "Margins"]


@dataclass(frozen=True)
class Effect:
    """What an edit did to the held-out pairs."""

    mean: float
    """Change of the margin, nats per token; below 0 steers away from the behaviour."""
    se: float
    """Standard error over prompts."""
    positive: float
    """Change of the positive completions' mean cross-entropy, nats per token."""
    negative: float
    """Change of the negative completions' mean cross-entropy, nats per token: damage, where it is far above 0."""
    max_relative_norm: float
    """Largest ‖Δ‖/‖h‖ over the edited positions."""


class Margins:
    """Held-out pairs with their residual stream cached at the hook point."""

    def __init__(
        self,
        model: SplitModel,
        pairs: Sequence[tuple[Completion, Completion]],
        prompts: Sequence[str],
        scope: Scope,
        batch_size: int = 16,
    ) -> None:
        self._model, self._prompts, self._scope = model, list(prompts), scope
        completions = [c for pair in pairs for c in pair]
        self._batches = [
            (batch, [completions[i] for i in batch], model.lower(pad([completions[i] for i in batch])))
            for batch in batches(completions, batch_size)
        ]
        self._loss_2P, _ = self._losses(None)

    def effect(self, rows: Rows) -> Effect:
        """The effect of applying `rows` at every position of the scope."""
        loss_2P, norm = self._losses(rows)
        change_P2 = (loss_2P - self._loss_2P).view(-1, 2)
        margin_P = change_P2[:, 1] - change_P2[:, 0]
        return Effect(
            mean=float(margin_P.mean()),
            se=float(clustered_se(margin_P[:, None], self._prompts)[0]),
            positive=float(change_P2[:, 0].mean()),
            negative=float(change_P2[:, 1].mean()),
            max_relative_norm=norm,
        )

    @torch.no_grad()
    def _losses(self, rows: Rows | None) -> tuple[Tensor, float]:
        loss_2P = torch.zeros(2 * len(self._prompts), dtype=torch.float64)
        norm = 0.0
        for batch, completions, h_BTD in self._batches:
            edited_BTD = h_BTD
            if rows is not None:
                edited_BTD = h_BTD.clone()
                for i, completion in enumerate(completions):
                    window = slice(positions(completion, self._scope).start, len(completion.ids))
                    h_ND = h_BTD[i, window]
                    delta_ND = delta(h_ND, rows)
                    edited_BTD[i, window] += delta_ND
                    norm = max(norm, float((delta_ND.norm(dim=-1) / h_ND.norm(dim=-1)).max()))
            loss_2P[batch] = losses(self._model, edited_BTD, completions).double()
        return loss_2P, norm
