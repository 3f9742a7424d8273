"""What each latent does: how often it fires on text and on chat, how strongly, and where most strongly.

Written beside the weights: `stats.safetensors` and `top_contexts.jsonl.gz`, one line a latent that fires:
`{"latent": 7, "top": [[activation, before, token, after], ...]}`.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from trimtab.attribution.training.cache import Shard
from trimtab.attribution.training.jumprelu import JumpReLU

__all__ = ["Latents"]

_TOP = 4
_BEFORE, _AFTER = 8, 2


class Top(NamedTuple):
    """One strong activation of a latent and the tokens around it."""

    activation: float
    document: int
    before: list[int]
    token: list[int]
    after: list[int]


@dataclass
class Latents:
    """Running statistics over shards; sinks are not in them."""

    sae: JumpReLU
    n_text: int = 0
    n_chat: int = 0
    n_sinks: int = 0
    norms: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        d_model, n_latents = self.sae.W_enc.shape
        self.fires_text, self.fires_chat, self.total, self.max = (torch.zeros(n_latents) for _ in range(4))
        self.sum = torch.zeros(d_model, dtype=torch.float64)
        self.chat_total = torch.zeros(n_latents)
        self.top: list[list[Top]] = [[] for _ in range(n_latents)]
        """Per latent, strongest first, a document at most once."""
        self._n_documents = 0

    def add(self, shard: Shard) -> None:
        """Count one shard's tokens."""
        h_TD = shard.h.float()
        self.norms.append(h_TD.norm(dim=1))
        self.sum += h_TD.sum(0, dtype=torch.float64)
        self.n_chat += int(shard.chat.sum())
        self.n_text += int((~shard.chat).sum())
        self.n_sinks += shard.n_sinks
        for start in range(0, len(h_TD), 2048):
            part = slice(start, start + 2048)
            a_TL = self.sae.encode(h_TD[part])
            fires_TL, chat_T = a_TL > 0, shard.chat[part]
            self.fires_chat += fires_TL[chat_T].sum(0)
            self.fires_text += fires_TL[~chat_T].sum(0)
            self.chat_total += a_TL[chat_T].sum(0)
            self.total += a_TL.sum(0)
            best = a_TL.max(0)
            self.max = torch.maximum(self.max, best.values)
            self._offer(shard, start, best.values, best.indices)
        self._n_documents += int(shard.document.max()) + 1

    def _offer(self, shard: Shard, start: int, value_L: torch.Tensor, at_L: torch.Tensor) -> None:
        """Let the strongest token of a part enter each latent's list."""
        floor_L = torch.tensor([tops[-1].activation if len(tops) == _TOP else 0.0 for tops in self.top])
        for latent in (value_L > floor_L).nonzero().squeeze(1).tolist():
            at = start + int(at_L[latent])
            document = int(shard.document[at])
            tops, number = self.top[latent], self._n_documents + document
            value = float(value_L[latent])
            if any(top.document == number and value <= top.activation for top in tops):
                continue
            first, end = torch.searchsorted(shard.document, torch.tensor([document, document + 1])).tolist()
            top = Top(
                value,
                number,
                shard.token[max(first, at - _BEFORE) : at].tolist(),
                shard.token[at : at + 1].tolist(),
                shard.token[at + 1 : min(end, at + 1 + _AFTER)].tolist(),
            )
            others = [other for other in tops if other.document != number]
            self.top[latent] = sorted([top, *others], key=lambda top: -top.activation)[:_TOP]

    @property
    def median_norm(self) -> float:
        return float(torch.cat(self.norms).median())

    @property
    def mean(self) -> torch.Tensor:
        """[D] mean of the residual stream."""
        return (self.sum / (self.n_text + self.n_chat)).float()

    @property
    def never_fires(self) -> float:
        """Fraction of latents that fired on no token counted."""
        return float((self.fires_text + self.fires_chat == 0).float().mean())

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write `stats.safetensors` and `top_contexts.jsonl.gz`."""
        fires = self.fires_text + self.fires_chat
        tensors = {
            "mean_activation_vector": self.mean,
            "median_norm": torch.tensor([self.median_norm]),
            "density_text": self.fires_text / max(self.n_text, 1),
            "density_chat": self.fires_chat / max(self.n_chat, 1),
            "max_activation": self.max,
            "mean_activation": self.total / fires.clamp(min=1),
        }
        save_file(tensors, folder / "stats.safetensors")
        (folder / "stats.safetensors").chmod(0o644)
        lines = []
        for latent, tops in enumerate(self.top):
            if tops:
                shown = [[round(top.activation, 1), *(tokenizer.decode(ids) for ids in top[2:])] for top in tops]
                lines.append(json.dumps({"latent": latent, "top": shown}, ensure_ascii=False))
        packed = gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0)
        (folder / "top_contexts.jsonl.gz").write_bytes(packed)
