"""A sparse autoencoder: which latents fire on a token, how strongly, and what each writes.

    φ_i(h) = x if x > θ_i else 0,  x = e_i · h + b_i        Δh = φ_i d_i

One threshold covers ReLU (0) and JumpReLU (> 0). What a library trains beyond that is folded into the rows where that is exact
(`sae_formats`). Two things cannot be: an input that is normalised token by token, and top-k, where a latent counts only by
comparison with all others. Such an SAE encodes exactly as its library does, but one latent of it cannot be read alone: `rows`
refuses every edit that reads, and `thresholded` gives a top-k SAE a threshold and says how well the two agree.

`stats.safetensors` beside the weights, when there, holds the measurements on the SAE's own held-out text (`Stats`).

Axes: T tokens, D d_model, L latents.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trimtab.attribution.edit import Rows
from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.attribution.errors import SAEError
from trimtab.attribution.matrix import Matrix, Stored, blocks
from trimtab.attribution.sae_files import digest, locate, name_of
from trimtab.attribution.sae_formats import Normalisation, read
from trimtab.attribution.stats import Stats, read_stats

if TYPE_CHECKING:
    from trimtab.attribution.bundle import ModelIdentity

__all__ = ["SAE", "Active", "shipped_sae"]

MAX_NUMBERS = 1 << 25
"""A matrix of more numbers than this (128 MB of fp32) stays in its file."""


class Active(NamedTuple):
    """The latents that fire, one entry each, in no order that matters."""

    token: Tensor
    latent: Tensor
    phi: Tensor
    """Activations, SAE units, all above 0."""


@dataclass(frozen=True)
class SAE:
    """An SAE with its input normalisation folded in; its rows may stay on disk."""

    id: str
    digest: str
    """`sha256:…` over configuration and weights."""
    layer: int
    """0-based; reads resid_post of this block."""
    e_LD: Matrix
    b_L: Tensor
    theta_L: Tensor
    d_LD: Matrix
    stats: Stats | None
    top_tokens: dict[int, tuple[str, ...]]
    """Tokens on which a latent fires most, where the folder says so."""
    k: int | None = None
    """Only the k largest activations of a token count; None where θ says which."""
    normalisation: Normalisation = "none"
    """What is done to each token before the encoder, where it cannot be folded."""
    notes: tuple[str, ...] = ()
    """What was done to read it, for people."""
    held_K: Tensor | None = None
    """Which latents of the SAE these rows are, where they are not all."""
    n_latents: int = 0
    """Latents of the whole SAE, where these rows are not all."""

    @property
    def d_sae(self) -> int:
        """Number of latents that are held."""
        return len(self.d_LD)

    @property
    def n_all(self) -> int:
        """Number of latents of the whole SAE."""
        return self.n_latents or self.d_sae

    def name(self, latent: int) -> int:
        """The number that the whole SAE gives to a row held here."""
        return latent if self.held_K is None else int(self.held_K[latent])

    def narrowed(self, latents: Tensor) -> SAE:
        """The rows of some latents alone, in memory.

        Raises:
            SAEError: a latent counts only by comparison with all others.
        """
        if self.k is not None:
            raise SAEError(f"SAE {self.id} cannot be narrowed to some latents: {self.unreadable}")
        return replace(
            self,
            e_LD=self.e_LD[latents],
            b_L=self.b_L[latents],
            theta_L=self.theta_L[latents],
            d_LD=self.d_LD[latents],
            stats=self.stats and self.stats.narrowed(latents),
            held_K=latents if self.held_K is None else self.held_K[latents],
            n_latents=self.n_all,
        )

    def on(self, device: torch.device) -> SAE:
        """The same with what is in memory on another device; what is mapped goes there a block at a time."""
        return replace(
            self,
            e_LD=self.e_LD.to(device) if isinstance(self.e_LD, Tensor) else self.e_LD,
            b_L=self.b_L.to(device),
            theta_L=self.theta_L.to(device),
            d_LD=self.d_LD.to(device) if isinstance(self.d_LD, Tensor) else self.d_LD,
            stats=self.stats and self.stats.on(device),
        )

    @property
    def unreadable(self) -> str | None:
        """Why no row can read one latent alone; None where it can."""
        if self.normalisation != "none":
            return f"it normalises each token first ({self.normalisation})"
        return None if self.k is None else f"a latent counts only among a token's top {self.k}"

    @classmethod
    def load(cls, source: Path | str) -> SAE:
        """Read an SAE from a folder, a file or a hub id, in any format that is no pickle.

        Raises:
            SAEError: it is incomplete or damaged, a pickle, or of no known format.
        """
        path = locate(str(source))
        found = read(path)
        folder = path if path.is_dir() else path.parent
        n_latents, d_model = found.d_LD.shape
        return cls(
            id=name_of(path),
            digest=digest(found.files),
            layer=found.layer,
            e_LD=_in_memory(found.e_LD),
            b_L=found.b_L,
            theta_L=found.theta_L,
            d_LD=_in_memory(found.d_LD),
            stats=read_stats(folder, n_latents, d_model),
            top_tokens=_top_tokens(folder),
            k=found.k,
            normalisation=found.normalisation,
            notes=found.notes,
        )

    def check_model(self, model: ModelIdentity) -> None:
        """Refuse a model of another shape.

        Raises:
            SAEError: another width, or the hook point is above the model's last block.
        """
        if self.d_LD.shape[1] != model.d_model:
            raise SAEError(
                f"SAE {self.id} has d_in {self.d_LD.shape[1]} but {model.id} has d_model {model.d_model}; "
                "give an SAE that was trained on this model"
            )
        if self.layer >= model.n_layers:
            raise SAEError(
                f"SAE {self.id} reads block {self.layer} but {model.id} has blocks 0..{model.n_layers - 1}; "
                "give an SAE that was trained on this model"
            )

    def active(self, h_TD: Tensor) -> Active:
        """The latents that fire on each token, over all latents, a block of them at a time."""
        n_TD = _normalised(h_TD.float(), self.normalisation)
        if self.k is None:
            parts = []
            for block in blocks(self.e_LD):
                x_TK = self._before(n_TD, block)
                token, latent = (x_TK > self.theta_L[block]).nonzero(as_tuple=True)
                parts.append(Active(token, latent + block.start, x_TK[token, latent]))
            return Active(*(torch.cat(part) for part in zip(*parts, strict=True)))
        top_Tk = n_TD.new_empty(len(n_TD), 0)
        latent_Tk = torch.empty(len(n_TD), 0, dtype=torch.long, device=n_TD.device)
        for block in blocks(self.e_LD):
            x_TK, i_TK = self._before(n_TD, block).topk(min(self.k, block.stop - block.start), dim=1)
            x_TK, i_TK = torch.cat([top_Tk, x_TK], 1), torch.cat([latent_Tk, i_TK + block.start], 1)
            top_Tk, at_Tk = x_TK.topk(min(self.k, x_TK.shape[1]), dim=1)
            latent_Tk = i_TK.gather(1, at_Tk)
        token, rank = (top_Tk > 0).nonzero(as_tuple=True)
        return Active(token, latent_Tk[token, rank], top_Tk[token, rank])

    def encode(self, h_TD: Tensor, latents: Tensor | None = None) -> Tensor:
        """Activations [T, L], or those of `latents` alone, SAE units."""
        if latents is not None and self.k is None:
            x_TK = self._before(_normalised(h_TD.float(), self.normalisation), latents)
            return torch.where(x_TK > self.theta_L[latents], x_TK, 0.0)
        token, latent, phi = self.active(h_TD)
        phi_TL = phi.new_zeros(len(h_TD), self.d_sae)
        phi_TL[token, latent] = phi
        return phi_TL if latents is None else phi_TL[:, latents]

    def rows(self, latents: list[int], alpha_K: Tensor, beta_K: Tensor) -> Rows:
        """The formula's rows that edit `latents`, one row each.

        Raises:
            SAEError: an edit reads a latent that cannot be read alone.
        """
        if self.unreadable and bool(beta_K.any()):
            raise SAEError(
                f"no edit can read a latent of SAE {self.id} alone: {self.unreadable}; use --operation add or project"
            )
        return Rows(alpha_K, beta_K, self.e_LD[latents], self.b_L[latents], self.theta_L[latents], self.d_LD[latents])

    def thresholded(self, h_TD: Tensor) -> tuple[SAE, float]:
        """This top-k SAE read at one threshold, that at which k latents fire on the mean token of h, and the agreement:
        |both| / |either| of what fires by the threshold and by the top k.

        Raises:
            SAEError: each token is normalised first, which no threshold mends.
        """
        if self.k is None or self.normalisation != "none":
            raise SAEError(f"a threshold does not make SAE {self.id} readable: {self.unreadable or 'it has one'}")
        wanted = self.k * len(h_TD)
        token, latent, phi = self.active(h_TD)
        theta = 0.0
        loose = replace(self, k=None)
        every = loose.active(h_TD).phi
        if len(every) > wanted:
            theta = float(every.topk(wanted + 1).values[-1])
        read_alone = replace(self, k=None, theta_L=torch.full_like(self.theta_L, theta))
        token_r, latent_r, _ = read_alone.active(h_TD)
        both = int(torch.isin(token * self.d_sae + latent, token_r * self.d_sae + latent_r).sum())
        agreement = both / max(len(phi) + len(token_r) - both, 1)
        note = f"its top {self.k} is read as a threshold of {theta:.4g}, which agrees to {agreement:.1%}"
        return replace(read_alone, notes=(*self.notes, note)), agreement

    def _before(self, n_TD: Tensor, which: slice | Tensor) -> Tensor:
        """x [T, K] of some latents, before the activation function."""
        return torch.addmm(self.b_L[which], n_TD, self.e_LD[which].to(n_TD.device).T)


def _in_memory(matrix: Stored) -> Matrix:
    """The matrix as fp32 where that is small; a large one stays in its file."""
    return matrix[:].contiguous() if matrix.W_LD.numel() <= MAX_NUMBERS else matrix


def _normalised(h_TD: Tensor, how: Normalisation) -> Tensor:
    match how:
        case "none":
            return h_TD
        case "layer_norm":  # Its definition in SAELens and in OpenAI's code, with the sample's standard deviation.
            h_TD = h_TD - h_TD.mean(dim=-1, keepdim=True)
            return h_TD / (h_TD.std(dim=-1, keepdim=True) + 1e-5)
        case "constant_norm_rescale":
            norm_T1: Tensor = torch.linalg.vector_norm(h_TD, dim=-1, keepdim=True)
            return h_TD * (math.sqrt(h_TD.shape[-1]) / norm_T1)


def shipped_sae() -> Path:
    """The folder of the SAE that ships for the embedded model."""
    return Path(__file__).parent / "saes" / EMBEDDED_MODEL / "blocks.14.hook_resid_post"


def _top_tokens(folder: Path) -> dict[int, tuple[str, ...]]:
    file = folder / "top_contexts.jsonl.gz"
    if not file.is_file():
        return {}
    try:
        entries = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
        return {e["latent"]: tuple(dict.fromkeys(token for _, _, token, _ in e["top"])) for e in entries}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as e:
        raise SAEError(f"{file} is damaged ({e}); fetch it again, or remove it") from e
