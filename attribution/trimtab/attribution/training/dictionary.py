"""The sparse autoencoder while it is trained, and its gradient, written out by hand because nearly all of it is zero.

For x [tokens, d_model], centred and scaled:

    z = x W_encᵀ + b_enc        a = z where z is among the k·tokens largest of the batch and positive, else 0
    x̂ = a W_dec + b_dec         loss = Σ‖x̂ − x‖² / Σ‖x‖²   (+ auxiliary)

(BatchTopK: Bussmann et al. 2024.) Only z is dense. With about k entries of a per token everything else runs over those
entries: a W_dec and the two weight gradients are sums of rows (`embedding_bag`), the gradient of a is a dense product sampled
at the entries. The auxiliary loss lets latents that have long been silent explain what is left of x (Gao et al. 2024, A.2),
on a part of the batch.

Axes: T tokens, D d_model, L latents, N entries of a that are not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag, normalize

__all__ = ["Dictionary", "Entries", "batch_top_k", "decode", "entry_products", "gradients", "rows_by_latent"]


@dataclass(frozen=True)
class Entries:
    """The entries of a sparse [T, L] matrix, row after row."""

    latent: torch.Tensor
    """[N] column of each entry."""
    value: torch.Tensor
    """[N]."""
    start: torch.Tensor
    """[T + 1] where each row begins, and the end."""
    n_latents: int

    @property
    def token(self) -> torch.Tensor:
        """[N] row of each entry."""
        counts_T = self.start.diff()
        return torch.repeat_interleave(torch.arange(len(counts_T)), counts_T)


@dataclass
class Dictionary:
    """The parameters. Rows of `W_dec` have norm 1."""

    W_enc: torch.Tensor
    """[L, D]; transposed on export."""
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    """[L, D]."""
    b_dec: torch.Tensor

    @classmethod
    def from_data(
        cls, x_TD: torch.Tensor, n_latents: int, encoder_gain: float, generator: torch.Generator
    ) -> Dictionary:
        """Decoder rows are data with a little noise, so that nearly every latent fires from the first step."""
        chosen = torch.randint(len(x_TD), (n_latents,), generator=generator)
        x_LD = normalize(x_TD[chosen])
        W_dec = normalize(x_LD + 0.5 * normalize(torch.randn(x_LD.shape, generator=generator)))
        return cls(encoder_gain * W_dec, torch.zeros(n_latents), W_dec, torch.zeros(x_TD.shape[1]))

    def parameters(self) -> tuple[torch.Tensor, ...]:
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    def encode(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Pre-activations z [T, L]."""
        return torch.addmm(self.b_enc, x_TD, self.W_enc.T)


def batch_top_k(z_TL: torch.Tensor, k: int, near: float) -> tuple[Entries, float]:
    """The k·T largest positive entries of `z_TL`, and the smallest of them.

    `near` is a guess at that smallest value: only what lies above a part of it is sorted. A bad guess costs time, no more.
    """
    n_tokens, n_latents = z_TL.shape
    n_kept = k * n_tokens
    flat = z_TL.view(-1)
    floor = max(0.85 * near, 0.0)
    at = (flat > floor).nonzero().squeeze(1)
    while len(at) < n_kept and floor > 0.0:
        floor = 0.5 * floor if floor > 1e-3 else 0.0
        at = (flat > floor).nonzero().squeeze(1)
    value = flat[at]
    lowest = 0.0
    if len(at) > n_kept:
        lowest = float(value.kthvalue(len(at) - n_kept + 1).values)
        kept = value >= lowest
        at, value = at[kept], value[kept]
    token = at.div(n_latents, rounding_mode="floor")
    start = torch.zeros(n_tokens + 1, dtype=torch.long)
    start[1:] = torch.bincount(token, minlength=n_tokens).cumsum(0)
    return Entries(at - token * n_latents, value, start, n_latents), lowest


def decode(a: Entries, W_dec: torch.Tensor) -> torch.Tensor:
    """a W_dec, [T, D]."""
    return embedding_bag(a.latent, W_dec, a.start[:-1], mode="sum", per_sample_weights=a.value)


def entry_products(a: Entries, left_TD: torch.Tensor, right_LD: torch.Tensor) -> torch.Tensor:
    """[N]: the entries of left rightᵀ at which `a` has one."""
    at = torch.sparse_csr_tensor(a.start, a.latent, a.value, (len(left_TD), a.n_latents), check_invariants=False)
    sampled: torch.Tensor = torch.sparse.sampled_addmm(at, left_TD, right_LD.T, beta=0.0)
    return sampled.values()


def rows_by_latent(a: Entries) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order [N], token [N], start [L]): the entries latent after latent, for sums over tokens."""
    order = a.latent.argsort()
    start = torch.zeros(a.n_latents, dtype=torch.long)
    start[1:] = torch.bincount(a.latent, minlength=a.n_latents).cumsum(0)[:-1]
    return order, a.token[order], start


def gradients(
    dictionary: Dictionary, x_TD: torch.Tensor, a: Entries
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(error [T, D], loss, gradient of each parameter) of the reconstruction loss; the choice of entries is held fixed."""
    error_TD = decode(a, dictionary.W_dec).add_(dictionary.b_dec).sub_(x_TD)
    scale = x_TD.square().sum()
    g_TD = error_TD * (2 / scale)
    g_a = entry_products(a, g_TD, dictionary.W_dec)
    order, token, start = rows_by_latent(a)
    g_W_dec = embedding_bag(token, g_TD, start, mode="sum", per_sample_weights=a.value[order])
    g_W_enc = embedding_bag(token, x_TD, start, mode="sum", per_sample_weights=g_a[order])
    g_b_enc = torch.zeros(a.n_latents).index_add_(0, a.latent, g_a)
    return error_TD, error_TD.square().sum() / scale, [g_W_enc, g_b_enc, g_W_dec, g_TD.sum(0)]


def add_auxiliary(
    dictionary: Dictionary,
    grads: list[torch.Tensor],
    x_TD: torch.Tensor,
    z_TS: torch.Tensor,
    error_TD: torch.Tensor,
    silent_S: torch.Tensor,
    aux_k: int,
    weight: float,
) -> None:
    """Add to `grads` the auxiliary loss: the `aux_k` strongest of the silent latents explain −error, which is held fixed."""
    W_SD = dictionary.W_dec[silent_S]
    k = min(aux_k, len(silent_S))
    top = z_TS.topk(k, dim=1)
    a_TS = torch.zeros_like(z_TS).scatter_(1, top.indices, top.values.relu())
    scale = error_TD.square().sum()
    g_TD = (a_TS @ W_SD + error_TD) * (2 * weight / scale)
    g_a_TS = (g_TD @ W_SD.T) * (a_TS > 0)
    grads[0].index_add_(0, silent_S, g_a_TS.T @ x_TD)
    grads[1].index_add_(0, silent_S, g_a_TS.sum(0))
    grads[2].index_add_(0, silent_S, a_TS.T @ g_TD)
