"""Attribution of every latent at once: the predicted change of each completion's loss under the edit of one latent.

To first order an edit Δ changes the loss by Σ_t g_t · Δ(h_t). With Δ = (α + β φ(h)) d, the row of `edit`, this is

    α d · Σ_t g_t + β Σ_t (g_t · d) φ(a_t)                add, ablate, clamp, scale: one vector, and one sparse encode
    −uᵀ M u,  M = Σ_t g_t (a_t − ā)ᵀ                      project to the baseline ā: a quadratic form, u = d / ‖d‖

so a D × D matrix accumulated once over all tokens scores the projection of *all* latents (Dupré la Tour and Mossing, Dec 2025,
whose Δ-attribution this is). **Δ** is positive minus negative. Above 0 the edit works against the behaviour: the loss of the
completions that show it rises more than the loss of those that lack it. For an edit that removes, that is a latent which *causes*
the behaviour; for one that turns up, a latent which *opposes* it. Unit: nats per completion token.

Beside the operations stand the scores that predict no edit: Δ-activation, and model diffing (`diffing`).

Axes: N tokens of a pass, D d_model, E = D + 2, L latents, K of them at a time, C chosen latents, P pairs, 2 the kinds (positive,
negative).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.attribution.edit import OPERATIONS, Operation, coefficients
from trimtab.attribution.gradients import Factors
from trimtab.attribution.matrix import Matrix, blocks
from trimtab.attribution.moments import Firings, Moments
from trimtab.attribution.sae import SAE

__all__ = ["Directions", "Method", "Scores", "completion_scores", "naive_project", "row_coefficients", "score"]

Method = Literal["add", "ablate", "clamp", "scale", "project", "delta_activation", "model_diffing"]
"""What a latent is scored by: an operation, or what stands beside."""
TRIANGLE, ROWS = 96, 1024
"""Columns of a block of the triangle, and rows of the decoder that meet it at a time: what stays in a processor's cache."""


@dataclass(frozen=True)
class Directions:
    """What the moments say of every decoder direction; no encoder is needed."""

    project_L: Tensor
    """Δ-attribution of the projection, −uᵀMu: the post's score."""
    gradient_L: Tensor
    """d · Σg, signed: Δ-attribution of adding one SAE unit."""
    projection_L: Tensor
    """(mean activation on the positives − ā) · u. Where it is below 0 and `project_L` is above, it is the *absence* of d that
    supports the behaviour: steer along its sign."""

    @classmethod
    def of(cls, moments: Moments, d_LD: Matrix, mean_D: Tensor) -> Directions:
        """One pass over the decoder, a block of rows at a time."""
        away_D = moments.a_2D[0].float() - mean_D
        T_DE = torch.cat([_triangle(moments.M_DD), moments.g_D.float()[:, None], away_D[:, None]], 1)
        found_3L = T_DE.new_empty(3, len(d_LD))
        for block in blocks(d_LD, ROWS):
            d_KD = d_LD[block].to(T_DE.device)
            norm_K = torch.linalg.vector_norm(d_KD, dim=1).clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
            y_KE = _products(d_KD, T_DE)
            found_3L[0, block] = -y_KE[:, :-2].mul_(d_KD).sum(1) / norm_K.square()
            found_3L[1, block] = y_KE[:, -2]
            found_3L[2, block] = y_KE[:, -1] / norm_K
        return cls(*found_3L)


def _triangle(M_DD: Tensor) -> Tensor:
    """The upper triangular T [D, D], fp32, whose quadratic form is that of M: each pair of entries meets the same product."""
    return (M_DD.triu() + M_DD.tril(-1).T).float()


def _products(d_KD: Tensor, T_DE: Tensor) -> Tensor:
    """dT [K, E] of a triangle with two columns more behind it: a block of columns at a time, and no row that lies below it, which
    leaves little more than half of the arithmetic."""
    n_rows, n_columns = T_DE.shape
    y_KE = d_KD.new_empty(len(d_KD), n_columns)
    for start in range(0, n_rows, TRIANGLE):
        stop = start + TRIANGLE if start + TRIANGLE < n_rows else n_columns
        torch.mm(d_KD[:, :stop], T_DE[:stop, start:stop], out=y_KE[:, start:stop])
    return y_KE


@dataclass(frozen=True)
class Scores:
    """Every latent's scores; Δ is positive minus negative."""

    operation: Operation
    """What is served."""
    by: dict[Method, Tensor]
    """[L] each: project, ablate and add, the operation that is served, Δ-activation, and model diffing where it was asked for."""
    projection_L: Tensor
    """Which side of the mean the positives are on, along each unit direction."""
    activation_L: Tensor
    """Mean activation on all completions, SAE units."""
    fires_L: Tensor
    """Whether the latent fires on any completion of a pair."""
    difference_in_means_D: Tensor
    """Mean residual activation on positive minus on negative completions."""

    @property
    def operation_L(self) -> Tensor:
        """Δ-attribution of the operation that is served."""
        return self.by[self.operation]

    @property
    def project_L(self) -> Tensor:
        """Δ-attribution of the projection: the post's score."""
        return self.by["project"]

    @property
    def delta_activation_L(self) -> Tensor:
        """Mean activation on positive minus on negative completions, SAE units."""
        return self.by["delta_activation"]


def score(
    moments: Moments,
    firings: Firings,
    sae: SAE,
    operation: Operation,
    amount_L: Tensor,
    mean_D: Tensor,
    directions: Directions | None = None,
) -> Scores:
    """Every latent's scores; `amount_L` is the amount of `operation` for each latent, SAE units.

    Of the operations that are not served, `add` is scored at one SAE unit and clamp and scale not at all.
    """
    directions = directions or Directions.of(moments, sae.d_LD, mean_D)
    by: dict[Method, Tensor] = {"project": directions.project_L.double()}
    for name in OPERATIONS:
        if name == operation != "project" or name in ("ablate", "add"):
            amount = amount_L if name == operation else torch.ones_like(amount_L)
            alpha_L, beta_L = row_coefficients(name, amount)
            by[name] = alpha_L.double() * directions.gradient_L.double() + beta_L.double() * firings.gphi_L
    by["delta_activation"] = firings.phi_2L[0] - firings.phi_2L[1]
    return Scores(
        operation=operation,
        by=by,
        projection_L=directions.projection_L,
        activation_L=firings.phi_2L.mean(0),
        fires_L=firings.n_L > 0,
        difference_in_means_D=(moments.a_2D[0] - moments.a_2D[1]).float(),
    )


def row_coefficients(operation: Operation, amount_L: Tensor) -> tuple[Tensor, Tensor]:
    """(α, β) of one row per latent at strength 1: both are linear in the amount."""
    at_0, at_1 = (coefficients(operation, amount=amount, strength=1.0) for amount in (0.0, 1.0))
    alpha_L, beta_L = (zero + (one - zero) * amount_L for zero, one in zip(at_0, at_1, strict=True))
    return alpha_L, beta_L


def completion_scores(
    passes: Iterable[Factors],
    sae: SAE,
    latents: Tensor,
    operation: Operation,
    amount_L: Tensor,
    mean_D: Tensor,
    n_completions: int,
) -> Tensor:
    """The operation's predicted change of each completion's loss [n_completions, C], fp64; a pair is two rows in turn."""
    d_CD = sae.d_LD[latents].to(mean_D.device)
    u_CD = d_CD / torch.linalg.vector_norm(d_CD, dim=1, keepdim=True)
    alpha_C, beta_C = row_coefficients(operation, amount_L[latents])
    total = torch.zeros(n_completions, len(latents), dtype=torch.float64, device=mean_D.device)
    for factors in passes:
        a_ND, g_ND = factors.a_ND.float(), factors.g_ND.float()
        if operation == "project":
            value_NC = -(g_ND @ u_CD.T) * ((a_ND - mean_D) @ u_CD.T)
        elif bool(beta_C.any()):
            value_NC = (g_ND @ d_CD.T) * (alpha_C + beta_C * sae.encode(a_ND, latents))
        else:
            value_NC = (g_ND @ d_CD.T) * alpha_C
        total.index_add_(0, factors.of_N, value_NC.double())
    return total


def naive_project(passes: Iterable[Factors], sae: SAE, mean_D: Tensor, n_pairs: int) -> Tensor:
    """−Σ_t (g_t · u)((a_t − ā) · u) [L], signed, token by token and latent by latent: the definition, and the oracle of tests."""
    d_LD = sae.d_LD[:]
    u_LD = d_LD / torch.linalg.vector_norm(d_LD, dim=1, keepdim=True)
    total_L = torch.zeros(len(u_LD), dtype=torch.float64)
    for a_ND, g_ND, of_N in passes:
        for a_D, g_D, of in zip(a_ND, g_ND, of_N.tolist(), strict=True):
            total_L -= (-1) ** of * ((u_LD @ g_D) * (u_LD @ (a_D - mean_D))).double() / n_pairs
    return total_L
