"""All latents of one hook point, ranked: what the passes, the SAE and the edit give together.

An encoder that is larger than the model would cost more than the gradients do. Where the edit does not read its latent and the
SAE's own statistics are known, such an SAE is scored whole from its decoder, and only the leading latents and as many random ones
are encoded: they are what selection, controls and Δ-activation then choose from. Whether that was done is recorded.

Axes: L latents, C chosen latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.attribution.authored import Authored
from trimtab.attribution.moments import Firings, Moments
from trimtab.attribution.passes import Passes
from trimtab.attribution.processes import Processes
from trimtab.attribution.sae import SAE
from trimtab.attribution.scores import Directions, Scores, completion_scores, score
from trimtab.attribution.selection import leading
from trimtab.attribution.stats import Stats
from trimtab.attribution.uncertainty import Uncertainty, uncertainty

__all__ = ["N_CANDIDATES", "N_UNCERTAIN", "Ranking", "rank"]

N_UNCERTAIN = 200
"""Leading latents that get intervals and p-values."""
N_CANDIDATES = 4096
"""Leading latents of a wide SAE that are encoded; as many random ones beside them."""


@dataclass(frozen=True)
class Ranking:
    """One hook point."""

    sae: SAE
    """Narrowed to the candidates where `narrowed`; all indices are of its rows."""
    stats: Stats
    scores: Scores
    live_L: Tensor
    """Latents that fire on held-out text and on the pairs."""
    best: list[int]
    """The leading live latents without near-duplicates, best first."""
    leading_C: Tensor
    """The leading live latents, near-duplicates included, best first."""
    uncertainty: Uncertainty
    """Of the score of each of `leading_C`."""
    n_tokens: int
    """Tokens that were scored."""

    @property
    def narrowed(self) -> bool:
        """Whether only the candidates of a wide SAE were encoded."""
        return self.sae.held_K is not None

    def uncertainty_of(self, latent: int) -> dict[str, float]:
        """`se`, `low`, `high`, `p` and `p_family` of a latent's score; empty where it does not lead."""
        found = (self.leading_C == latent).nonzero()
        return (
            {}
            if not len(found)
            else {name[:-2]: float(v_C[found[0, 0]]) for name, v_C in self.uncertainty._asdict().items()}
        )


def rank(
    passes: Passes,
    sae: SAE,
    stats_of: Callable[[SAE], Stats],
    edit: Authored,
    *,
    mean_D: Tensor,
    prompts: Sequence[str],
    processes: Processes,
    top: int,
    n_encoded: int,
) -> Ranking:
    """Rank the latents of an SAE by the passes over pairs of the `prompts`; an encoder of more than `n_encoded` numbers is
    applied to candidates alone, where the edit allows it. `stats_of` tells the statistics of an SAE's latents."""
    n_pairs, layer = len(prompts), sae.layer
    moments = Moments.over(passes.factors(layer), mean_D, n_pairs)
    n_tokens = torch.tensor(moments.n_tokens, device=mean_D.device)
    processes.add_up(moments.M_DD, moments.g_D, moments.a_2D, n_tokens)
    directions = Directions.of(moments, sae.d_LD, mean_D)
    if sae.e_LD.shape.numel() > n_encoded and edit.scored_by_decoder and sae.k is None:
        project = edit.operation == "project"
        score_L = directions.project_L if project else edit.amounts(stats_of(sae)) * directions.gradient_L
        held = _candidates(score_L)
        sae = sae.narrowed(held)
        directions = Directions(*(getattr(directions, f)[held] for f in ("project_L", "gradient_L", "projection_L")))
    stats = stats_of(sae)
    firings = Firings.over(passes.factors(layer), sae, n_pairs)
    processes.add_up(firings.gphi_L, firings.phi_2L, firings.n_L)
    amount_L = edit.amounts(stats)
    scores = score(moments, firings, sae, edit.operation, amount_L, mean_D, directions)
    live_L = (stats.density_L > 0) & scores.fires_L
    best = leading(scores.operation_L, live_L, sae.d_LD, top)
    order_L = torch.where(live_L, scores.operation_L, -torch.inf).argsort(descending=True, stable=True)
    leading_C = order_L[: min(N_UNCERTAIN, int(live_L.sum()))]
    each = completion_scores(passes.factors(layer), sae, leading_C, edit.operation, amount_L, mean_D, 2 * n_pairs)
    processes.add_up(each)
    sure = uncertainty(each[0::2] - each[1::2], prompts)
    return Ranking(sae, stats, scores, live_L, best, leading_C.cpu(), sure, int(n_tokens))


def _candidates(score_L: Tensor) -> Tensor:
    """The leading latents and as many random others, in order of their number."""
    lead = score_L.topk(min(N_CANDIDATES, len(score_L))).indices
    others = torch.randperm(len(score_L), generator=torch.Generator().manual_seed(0))[:N_CANDIDATES].to(lead.device)
    chosen_L = torch.zeros(len(score_L), dtype=torch.bool, device=lead.device)
    chosen_L[lead] = chosen_L[others] = True
    return chosen_L.nonzero().squeeze(1)
