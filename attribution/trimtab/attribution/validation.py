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
        self._completions = [c for pair in pairs for c in pair]
        self._batch_size = batch_size
        self._h: list[Tensor] = [torch.empty(0)] * len(self._completions)
        """[T, D] of each completion, unedited."""
        for batch in batches(self._completions, batch_size):
            h_BTD = model.lower(pad([self._completions[i] for i in batch]))
            for row, i in enumerate(batch):
                self._h[i] = h_BTD[row, : len(self._completions[i].ids)]
        self._loss_2P = torch.zeros(len(self._completions), dtype=torch.float64)
        self._recompute(self._loss_2P, dict(enumerate(self._h)))

    def effect(self, rows: Rows) -> Effect:
        """The effect of applying `rows` at every position of the scope."""
        loss_2P, edited, norm = self._loss_2P.clone(), {}, 0.0
        for i, (completion, h_TD) in enumerate(zip(self._completions, self._h, strict=True)):
            window = slice(positions(completion, self._scope).start, None)
            delta_ND = delta(h_TD[window], rows)
            if not bool(delta_ND.any()):
                continue  # No edited latent fires: the loss cannot change.
            edited[i] = h_TD.clone()
            edited[i][window] += delta_ND
            norm = max(norm, float((delta_ND.norm(dim=-1) / h_TD[window].norm(dim=-1)).max()))
        self._recompute(loss_2P, edited)
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
    def _recompute(self, loss_2P: Tensor, streams: dict[int, Tensor]) -> None:
        """Put into `loss_2P` the losses of the completions in `streams`, each with its own residual stream [T, D]."""
        indices = list(streams)
        for batch in batches([self._completions[i] for i in indices], self._batch_size):
            chosen = [indices[j] for j in batch]
            h_BTD = torch.nn.utils.rnn.pad_sequence([streams[i] for i in chosen], batch_first=True)
            loss_2P[chosen] = losses(self._model, h_BTD, [self._completions[i] for i in chosen]).double()
