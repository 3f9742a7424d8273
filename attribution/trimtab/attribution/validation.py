"""The first validation: does the edit do what the attribution predicted, on pairs that the attribution never saw?

The measure is the log-probability margin of the positive over the negative completion, mean per token, under the edit minus
without it: an effect below 0 steers away from the behaviour. The residual stream at the hook point is computed once, and so are
the keys and values of every token before the first edited one; since an edit acts there and nowhere below, each edit costs one
pass of the edited tokens through the upper blocks, many edits in one batch, and is exact.

Teacher-forced margins are cheap and smooth, but sampled text is what a user reads: judge an edit by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.attribution.edit import Rows, delta
from trimtab.attribution.gradients import BATCH_TOKENS, Scope, losses, positions
from trimtab.attribution.model import Prefix, SplitModel, pad
from trimtab.attribution.pairs import Completion
from trimtab.attribution.uncertainty import clustered_se

__all__ = ["MAX_DAMAGE", "STRENGTHS", "Effect", "Effects", "Margins"]

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Strengths of the recommended edits at which the margin is measured."""
MAX_DAMAGE = 0.5
"""A strength is safe while it raises the cross-entropy of the negative completions by less than this, nats per token. On the
embedded model sampled text is whole at +0.2, turns into lists at +0.8 and falls apart at +2.4."""


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


@dataclass(frozen=True)
class Effects:
    """Every intervention of a run, on the same held-out pairs."""

    each: dict[int, Effect]
    """Each leading latent under its recommended edit."""
    together: dict[float, Effect]
    """The recommended edits together, by strength."""
    random: tuple[Effect, ...]
    """The same edit on random live latents, one at a time."""
    random_together: Effect
    """The same edit on as many random live latents as lead."""
    delta_activation: Effect
    """The same edit on as many leaders by Δ-activation."""
    difference_in_means: Effect
    """The difference in means, subtracted once."""

    @property
    def safe(self) -> tuple[float, float] | None:
        """(0, the largest measured strength up to which the negative completions stay likely); None where no strength is."""
        safe = 0.0
        for strength, effect in sorted(self.together.items()):
            if effect.negative > MAX_DAMAGE:
                break
            safe = strength
        return (0.0, safe) if safe else None

    def summary(self) -> dict[str, Any]:
        """The controls as a bundle's provenance records them, nats per token."""
        return {
            "together": {f"{strength:g}": round(e.mean, 4) for strength, e in self.together.items()},
            "together_se": {f"{strength:g}": round(e.se, 4) for strength, e in self.together.items()},
            "damage": {f"{strength:g}": round(e.negative, 4) for strength, e in self.together.items()},
            "random_each": round(mean(e.mean for e in self.random), 4),
            "random_each_sd": round(stdev(e.mean for e in self.random), 4),
            "controls": {
                name: {"margin": round(e.mean, 4), "se": round(e.se, 4), "damage": round(e.negative, 4)}
                for name, e in (
                    ("random", self.random_together),
                    ("delta_activation", self.delta_activation),
                    ("difference_in_means", self.difference_in_means),
                )
            },
        }


class Margins:
    """Held-out pairs with their residual stream cached at the hook point."""

    def __init__(
        self,
        model: SplitModel,
        pairs: Sequence[tuple[Completion, Completion]],
        prompts: Sequence[str],
        scope: Scope,
        left_alone: frozenset[int] = frozenset(),
    ) -> None:
        """`left_alone` are token ids whose positions no edit touches."""
        self._model, self._prompts = model, list(prompts)
        self._completions = [c for pair in pairs for c in pair]
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, completion in enumerate(self._completions):
            by_prompt.setdefault(completion.ids[: completion.n_prompt], []).append(i)
        self._groups = [self._group(indices, scope, left_alone) for indices in by_prompt.values()]
        self._loss_2P = torch.zeros(len(self._completions), dtype=torch.float64)
        for group in self._groups:
            streams = {(0, i): h_TD for i, h_TD in zip(group.indices, group.h, strict=True)}
            self._recompute(self._loss_2P[None], group, streams)

    def effect(self, rows: Rows) -> Effect:
        """The effect of applying `rows` at every position of the scope."""
        return self.effects([rows])[0]

    def effects(self, edits: Sequence[Rows]) -> list[Effect]:
        """The effect of each edit alone; the completions of one prompt go through the upper blocks together, under all edits."""
        loss_E2P, norm_E = self._loss_2P.repeat(len(edits), 1), [0.0] * len(edits)
        for group in self._groups:
            streams: dict[tuple[int, int], Tensor] = {}
            completions = zip(group.indices, group.h, group.edited, strict=True)
            for (i, h_TD, edited_N), (e, rows) in product(completions, enumerate(edits)):
                delta_ND = delta(h_TD[group.first :], rows) * edited_N[:, None]
                if not bool(delta_ND.any()):
                    continue  # No edited latent fires: the loss cannot change.
                streams[e, i] = torch.cat([h_TD[: group.first], h_TD[group.first :] + delta_ND]).to(h_TD.dtype)
                norm_N = torch.linalg.vector_norm(delta_ND, dim=-1) / h_TD[group.first :].float().norm(dim=-1)
                norm_E[e] = max(norm_E[e], float(norm_N.max()))
                if sum(map(len, streams.values())) >= BATCH_TOKENS:
                    self._recompute(loss_E2P, group, streams)
                    streams = {}
            self._recompute(loss_E2P, group, streams)
        change_EP2 = (loss_E2P - self._loss_2P).view(len(edits), len(self._prompts), 2)
        margin_EP = change_EP2[:, :, 1] - change_EP2[:, :, 0]
        se_E = clustered_se(margin_EP.T, self._prompts)
        return [
            Effect(
                mean=float(margin_EP[e].mean()),
                se=float(se_E[e]),
                positive=float(change_EP2[e, :, 0].mean()),
                negative=float(change_EP2[e, :, 1].mean()),
                max_relative_norm=norm_E[e],
            )
            for e in range(len(edits))
        ]

    def _group(self, indices: list[int], scope: Scope, left_alone: frozenset[int]) -> _Group:
        """Completions of one prompt; of the tokens that the scope leaves alone only keys and values are kept."""
        h_BTD = self._model.lower(pad([self._completions[i] for i in indices]))
        first = positions(self._completions[indices[0]], scope).start
        prefix = self._model.prefix(h_BTD[0, :first])
        start = 0 if prefix is None else first
        h = [h_TD[start : len(self._completions[i].ids)] for i, h_TD in zip(indices, h_BTD, strict=True)]
        ids = [self._completions[i].ids[first:] for i in indices]
        edited = [torch.tensor([token not in left_alone for token in part], device=h_BTD.device) for part in ids]
        return _Group(indices, prefix, h, first - start, edited)

    @torch.no_grad()
    def _recompute(self, loss_E2P: Tensor, group: _Group, streams: dict[tuple[int, int], Tensor]) -> None:
        """Put into `loss_E2P` the losses of (edit, completion), each with its own residual stream."""
        if streams:
            h_BTD = torch.nn.utils.rnn.pad_sequence(list(streams.values()), batch_first=True)
            chosen = [self._completions[i] for _, i in streams]
            loss_B = losses(self._model, h_BTD, chosen, group.prefix).double().cpu()
            loss_E2P[tuple(torch.tensor(list(streams)).T)] = loss_B


class _Group(NamedTuple):
    """Completions of one prompt."""

    indices: list[int]
    prefix: Prefix | None
    h: list[Tensor]
    """[T, D] of each completion at the hook point, unedited, from the end of the prefix on."""
    first: int
    """The first row of `h` that the scope edits."""
    edited: list[Tensor]
    """[T − first] of each completion: whether an edit touches the token."""
