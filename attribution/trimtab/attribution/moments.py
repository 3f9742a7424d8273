"""What is summed over the tokens of all completions, and is enough to score every latent.

`Moments` knows no SAE: one D × D matrix a hook point, whose cost per token does not depend on how many latents there are.
`Firings` is one sparse encode: what an operation that reads the latent needs, and Δ-activation.

Sums run over a completion's tokens, whose loss is a mean per token; completions are averaged; *signed* sums are positive minus
negative. Products are taken and added up in fp32 over a few thousand tokens, and in fp64 beyond.

Axes: N tokens of a pass, D d_model, L latents, 2 the kinds (positive, negative).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.attribution.gradients import Factors
from trimtab.attribution.sae import SAE

__all__ = ["Firings", "Moments", "weights"]

RECENT = 8192
"""Tokens whose products are added up in fp32 before they join M in fp64."""
GATHERED = 1 << 23
"""Numbers of decoder rows that are gathered at once, 32 MB of fp32."""


def weights(of_N: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
    """(signed [N], share [N]): a token's weight in a signed sum, and in the mean over its completion's tokens and its kind."""
    signed_N = (1 - 2 * (of_N % 2)) / n_pairs
    n_tokens = torch.bincount(of_N)
    return signed_N, 1 / (n_tokens[of_N] * n_pairs)


@dataclass
class Moments:
    """Sums over tokens at one hook point."""

    M_DD: Tensor
    """Signed Σ_t g_t (a_t − ā)ᵀ, fp64."""
    g_D: Tensor
    """Signed Σ_t g_t, fp64."""
    a_2D: Tensor
    """Mean residual activation of each kind, fp64."""
    n_tokens: int

    @classmethod
    def over(cls, passes: Iterable[Factors], mean_D: Tensor, n_pairs: int) -> Moments:
        """The moments of a data set of `n_pairs` pairs, or this process's part of them."""
        zeros_D = torch.zeros(mean_D.shape[0], dtype=torch.float64, device=mean_D.device)
        sums = cls(zeros_D.new_zeros(len(zeros_D), len(zeros_D)), zeros_D, zeros_D.new_zeros(2, len(zeros_D)), 0)
        recent_DD, n_flushed = torch.zeros_like(sums.M_DD, dtype=torch.float32), 0
        for factors in passes:
            sums._add(factors, mean_D, n_pairs, recent_DD)
            if sums.n_tokens - n_flushed >= RECENT:
                sums.M_DD += recent_DD
                recent_DD.zero_()
                n_flushed = sums.n_tokens
        sums.M_DD += recent_DD
        return sums

    def _add(self, factors: Factors, mean_D: Tensor, n_pairs: int, recent_DD: Tensor) -> None:
        """Accumulate one pass, its product into `recent_DD`."""
        a_ND, g_ND, of_N = factors.a_ND.float(), factors.g_ND.float(), factors.of_N
        signed_N, share_N = weights(of_N, n_pairs)
        g_ND = g_ND * signed_N[:, None].float()
        recent_DD.addmm_(g_ND.T, a_ND - mean_D)
        self.g_D += g_ND.sum(0)
        share_2N = torch.stack([share_N * (of_N % 2 == kind) for kind in (0, 1)]).float()
        self.a_2D += share_2N @ a_ND
        self.n_tokens += len(of_N)


@dataclass
class Firings:
    """Sums over the tokens on which each latent fires."""

    gphi_L: Tensor
    """Signed Σ_t (g_t · d) φ(a_t), fp64."""
    phi_2L: Tensor
    """Mean activation on each kind, SAE units, fp64."""
    n_L: Tensor
    """Tokens on which the latent fires."""

    @classmethod
    def over(cls, passes: Iterable[Factors], sae: SAE, n_pairs: int) -> Firings:
        """Encode every pass; the cost per token grows with the number of latents."""
        zeros_L = torch.zeros(sae.d_sae, dtype=torch.float64, device=sae.b_L.device)
        sums = cls(zeros_L, zeros_L.new_zeros(2, sae.d_sae), torch.zeros_like(zeros_L, dtype=torch.long))
        for factors in passes:
            sums.add(factors, sae, n_pairs)
        return sums

    def add(self, factors: Factors, sae: SAE, n_pairs: int) -> None:
        """Accumulate one pass."""
        a_ND, g_ND, of_N = factors.a_ND.float(), factors.g_ND.float(), factors.of_N
        signed_N, share_N = weights(of_N, n_pairs)
        active = sae.active(a_ND)
        self.n_L += torch.bincount(active.latent, minlength=sae.d_sae)
        size = max(1, GATHERED // a_ND.shape[1])
        for part in (slice(start, start + size) for start in range(0, len(active.phi), size)):
            token, latent, phi = active.token[part], active.latent[part], active.phi[part].double()
            g_dot_d = torch.linalg.vecdot(g_ND[token], sae.d_LD[latent]).double()
            self.gphi_L.index_add_(0, latent, signed_N[token] * phi * g_dot_d)
            kind_latent = (of_N[token] % 2) * sae.d_sae + latent
            self.phi_2L.view(-1).index_add_(0, kind_latent, share_N[token] * phi)
