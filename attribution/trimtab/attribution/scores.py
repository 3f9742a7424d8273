"""Attribution of every latent at once: the predicted change of each completion's loss under the edit of one latent.

To first order an edit Δ changes the loss by Σ_t g_t · Δ(h_t). With Δ = (α + β φ(h)) d, the row of `edit`, this is

    α d · Σ_t g_t + β Σ_t (g_t · d) φ(a_t)                add, ablate, clamp, scale: one vector, and one sparse encode
    −uᵀ M u,  M = Σ_t g_t (a_t − ā)ᵀ                      project to the baseline ā: a quadratic form, u = d / ‖d‖

so a D × D matrix accumulated once over all tokens scores the projection of *all* latents (Dupré la Tour and Mossing, Dec 2025,
whose Δ-attribution this is). Sums run over the tokens of a completion, whose loss is a mean per token; completions are averaged;
**Δ** is positive minus negative. Above 0 the edit works against the behaviour: the loss of the completions that show it rises
more than the loss of those that lack it. For an edit that removes, that is a latent which *causes* the behaviour; for one that
turns up, a latent which *opposes* it. Unit: nats per completion token.

Axes: N tokens of a trace, D d_model, L latents, C chosen latents, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.attribution.edit import Operation, coefficients
from trimtab.attribution.gradients import Trace
from trimtab.attribution.sae import SAE

__all__ = ["PairScores", "Scores", "Sums", "clustered_se", "naive_project", "pair_scores", "row_coefficients", "score"]


@dataclass
class Sums:
    """What is accumulated over the completions of one kind; every field is a mean over completions."""

    M_DD: Tensor
    """Σ_t g_t (a_t − ā)ᵀ, fp64."""
    g_D: Tensor
    """Σ_t g_t."""
    gphi_L: Tensor
    """Σ_t (g_t · d) φ(a_t)."""
    phi_L: Tensor
    """Mean activation over the completion's tokens."""
    a_D: Tensor
    """Mean residual activation over the completion's tokens."""
    fires_L: Tensor
    """Whether the latent fired at all."""

    @classmethod
    def over(cls, traces: Sequence[Trace], sae: SAE, mean_D: Tensor) -> Sums:
        """Accumulate the traces of one kind of completion."""
        n_latents, d_model = sae.d_LD.shape
        zeros_D, zeros_L = torch.zeros(d_model, dtype=torch.float64), torch.zeros(n_latents, dtype=torch.float64)
        sums = cls(
            torch.zeros(d_model, d_model, dtype=torch.float64),
            zeros_D,
            zeros_L,
            zeros_L.clone(),
            zeros_D.clone(),
            zeros_L > 0,
        )
        weight = 1 / max(len(traces), 1)
        for a_ND, g_ND, _ in traces:
            a64_ND, g64_ND = a_ND.double(), g_ND.double()
            sums.M_DD += weight * (g64_ND.T @ (a64_ND - mean_D.double()))
            sums.g_D += weight * g64_ND.sum(0)
            sums.a_D += weight * a64_ND.mean(0)
            phi_NL = sae.encode(a_ND)
            token, latent = phi_NL.nonzero(as_tuple=True)
            phi = phi_NL[token, latent].double()
            g_dot_d = (g_ND[token] * sae.d_LD[latent]).sum(1).double()
            sums.gphi_L.index_add_(0, latent, weight * phi * g_dot_d)
            sums.phi_L.index_add_(0, latent, weight * phi / len(a_ND))
            sums.fires_L[latent] = True
        return sums


@dataclass(frozen=True)
class Scores:
    """Every latent's scores; Δ is positive minus negative."""

    project_L: Tensor
    """Δ-attribution of the projection, unit directions: the post's score."""
    operation_L: Tensor
    """Δ-attribution of the operation that is served."""
    delta_activation_L: Tensor
    """Mean activation on positive minus on negative completions, SAE units."""
    difference_in_means_D: Tensor
    """Mean residual activation on positive minus on negative completions."""
    fires_L: Tensor
    """Whether the latent fires on any completion of a pair."""


def score(positive: Sums, negative: Sums, sae: SAE, operation: Operation, amount_L: Tensor) -> Scores:
    """Scores from the two accumulators; `amount_L` is the operation's amount for each latent, SAE units."""
    d_LD = sae.d_LD[:].double()
    u_LD = d_LD / d_LD.norm(dim=1, keepdim=True)
    project_L = -((u_LD @ (positive.M_DD - negative.M_DD)) * u_LD).sum(1)
    if operation == "project":
        operation_L = project_L
    else:
        alpha_L, beta_L = row_coefficients(operation, amount_L)
        direct_L = d_LD @ (positive.g_D - negative.g_D)
        operation_L = alpha_L.double() * direct_L + beta_L.double() * (positive.gphi_L - negative.gphi_L)
    return Scores(
        project_L=project_L,
        operation_L=operation_L,
        delta_activation_L=positive.phi_L - negative.phi_L,
        difference_in_means_D=(positive.a_D - negative.a_D).float(),
        fires_L=positive.fires_L | negative.fires_L,
    )


def row_coefficients(operation: Operation, amount_L: Tensor) -> tuple[Tensor, Tensor]:
    """(α, β) of one row per latent at strength 1."""
    pairs = [coefficients(operation, amount=float(amount), strength=1.0) for amount in amount_L]
    return torch.tensor([alpha for alpha, _ in pairs]), torch.tensor([beta for _, beta in pairs])


@dataclass(frozen=True)
class PairScores:
    """Scores of chosen latents, pair by pair."""

    project_PC: Tensor
    operation_PC: Tensor


def pair_scores(
    positive: Sequence[Trace],
    negative: Sequence[Trace],
    sae: SAE,
    latents: Tensor,
    operation: Operation,
    amount_L: Tensor,
    mean_D: Tensor,
) -> PairScores:
    """The scores of `latents` for every single pair, for standard errors."""
    d_CD = sae.d_LD[latents]
    u_CD = d_CD / d_CD.norm(dim=1, keepdim=True)
    alpha_C, beta_C = row_coefficients(operation, amount_L[latents])

    def of(trace: Trace) -> tuple[Tensor, Tensor]:
        project_C = -((trace.g_ND @ u_CD.T) * ((trace.a_ND - mean_D) @ u_CD.T)).sum(0)
        phi_NC = sae.encode(trace.a_ND, latents)
        operation_C = ((trace.g_ND @ d_CD.T) * (alpha_C + beta_C * phi_NC)).sum(0)
        return project_C, project_C if operation == "project" else operation_C

    rows = [(of(p), of(n)) for p, n in zip(positive, negative, strict=True)]
    return PairScores(
        project_PC=torch.stack([p[0] - n[0] for p, n in rows]),
        operation_PC=torch.stack([p[1] - n[1] for p, n in rows]),
    )


def clustered_se(values_PC: Tensor, clusters: Sequence[str]) -> Tensor:
    """Standard error [C] of the mean over pairs; pairs of one prompt are one cluster, as they are not independent."""
    names = sorted(set(clusters))
    index_P = torch.tensor([names.index(c) for c in clusters])
    values_PC = values_PC.double()
    residual_PC = values_PC - values_PC.mean(0)
    sums_KC = torch.zeros(len(names), values_PC.shape[1], dtype=torch.float64).index_add_(0, index_P, residual_PC)
    correction = len(names) / max(len(names) - 1, 1)
    return (sums_KC.square().sum(0) * correction).sqrt() / len(values_PC)


def naive_project(traces: Sequence[Trace], sae: SAE, mean_D: Tensor) -> Tensor:
    """−Σ_t (g_t · u)((a_t − ā) · u) [L] latent by latent and token by token: the definition, and the oracle of the tests."""
    d_LD = sae.d_LD[:]
    u_LD = d_LD / d_LD.norm(dim=1, keepdim=True)
    total_L = torch.zeros(len(u_LD), dtype=torch.float64)
    for a_ND, g_ND, _ in traces:
        for a_D, g_D in zip(a_ND, g_ND, strict=True):
            total_L -= ((u_LD @ g_D) * (u_LD @ (a_D - mean_D))).double()
    return total_L / len(traces)
