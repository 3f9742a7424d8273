"""How sure a mean over pairs is: pairs of one prompt are not independent, so a prompt is what is resampled.

Axes: P pairs, K prompts (clusters), C columns, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RESAMPLES", "Uncertainty", "clustered_se", "uncertainty"]

RESAMPLES = 2_000


class Uncertainty(NamedTuple):
    """Of the mean of each column."""

    se_C: Tensor
    """Standard error, clustered by prompt."""
    low_C: Tensor
    """Lower end of the 95 % bootstrap interval over prompts."""
    high_C: Tensor
    p_C: Tensor
    """Two-sided sign-flip p-value: how often a mean as far from 0 arises when each prompt's sign is a coin's."""
    p_family_C: Tensor
    """The same for the farthest of all C columns at once (Westfall and Young's max-T): the chance of even one false find."""


def uncertainty(
    values_PC: Tensor, clusters: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Uncertainty:
    """Intervals and p-values for the mean over pairs of every column."""
    values_PC = values_PC.double().cpu()
    sums_KC, sizes_K = _by_cluster(values_PC, clusters)
    n_clusters = len(sizes_K)
    generator = torch.Generator().manual_seed(seed)
    drawn_BK = torch.randint(n_clusters, (resamples, n_clusters), generator=generator)
    counts_BK = torch.zeros(resamples, n_clusters, dtype=torch.float64).scatter_add_(
        1, drawn_BK, torch.ones(drawn_BK.shape, dtype=torch.float64)
    )
    means_BC = counts_BK @ sums_KC / (counts_BK @ sizes_K)[:, None]
    low_C, high_C = torch.quantile(means_BC, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)

    signs_BK = 2.0 * torch.randint(2, (resamples, n_clusters), generator=generator).double() - 1
    se_C = clustered_se(values_PC, clusters)
    scale_C = sums_KC.square().sum(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)  # Of the sum under flips.
    seen_C = sums_KC.sum(0).abs() / scale_C * (1 - 1e-12)  # A flip that changes nothing counts as equal.
    flipped_BC = (signs_BK @ sums_KC).abs() / scale_C
    p_C = (1 + (flipped_BC >= seen_C).sum(0)) / (1 + resamples)
    p_family_C = (1 + (flipped_BC.amax(1, keepdim=True) >= seen_C).sum(0)) / (1 + resamples)
    return Uncertainty(se_C, low_C, high_C, p_C, p_family_C)


def clustered_se(values_PC: Tensor, clusters: Sequence[str]) -> Tensor:
    """Standard error [C] of the mean over pairs; pairs of one prompt are one cluster, as they are not independent."""
    values_PC = values_PC.double().cpu()
    sums_KC, _ = _by_cluster(values_PC - values_PC.mean(0), clusters)
    correction = len(sums_KC) / max(len(sums_KC) - 1, 1)
    return (sums_KC.square().sum(0) * correction).sqrt() / len(values_PC)


def _by_cluster(values_PC: Tensor, clusters: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(the sum [K, C], the number of pairs [K]) of each prompt."""
    number = {name: k for k, name in enumerate(sorted(set(clusters)))}
    index_P = torch.tensor([number[name] for name in clusters])
    sums_KC = values_PC.new_zeros(len(number), values_PC.shape[1]).index_add_(0, index_P, values_PC)
    return sums_KC, torch.bincount(index_P, minlength=len(number)).double()
