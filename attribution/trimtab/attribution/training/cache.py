"""Activations on disk: the residual stream at the hook point for every token learnt from, in fp16 shards.

A shard is one safetensors file: `h` [tokens, d_model] fp16, and per token `token` and `position` (int32), `document` (int32,
its number in the shard) and `chat` (bool). Shards are made in any order by any number of processes: each takes the next one
that is neither there nor locked. A shard is complete or absent.

Sinks. A few tokens carry a norm 100 times the others' and would be all that a squared error sees. Position 0 is never
stored; a token of norm above `SINK_RATIO` times the median is dropped when a shard is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from trimtab.attribution.training.corpus import Document

__all__ = ["LEARNT", "SHARD_TOKENS", "SINK_RATIO", "LowerModel", "Shard", "fill", "partition", "read_shard"]

LEARNT = ("samples", "corpus", "more")
"""Names of the shards to learn from."""
SHARD_TOKENS = 32_768
SINK_RATIO = 6.0
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Shard:
    """One shard as read: sinks dropped."""

    h: torch.Tensor
    """[tokens, d_model] fp16."""
    token: torch.Tensor
    position: torch.Tensor
    document: torch.Tensor
    chat: torch.Tensor
    n_sinks: int
    """Tokens dropped for their norm."""


class LowerModel:
    """The blocks up to the hook point: the ones above are cut off, so that a forward pass costs what it must."""

    def __init__(self, model_folder: str, layer: int) -> None:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(model_folder, dtype=torch.float32)
        model.layers = model.layers[: layer + 1]
        model.norm = torch.nn.Identity()
        self._model: Any = model.eval()

    @torch.inference_mode()
    def __call__(self, documents: Sequence[Document]) -> list[torch.Tensor]:
        """Output of block `layer` for each document, [tokens, d_model]. Padding is on the right, out of causal sight."""
        lengths = [len(document.tokens) for document in documents]
        ids = torch.zeros(len(documents), max(lengths), dtype=torch.long)
        for row, document in zip(ids, documents, strict=True):
            row[: len(document.tokens)] = torch.tensor(document.tokens)
        h_BTD = self._model(input_ids=ids, use_cache=False).last_hidden_state
        return [h_TD[:n] for h_TD, n in zip(h_BTD, lengths, strict=True)]


def partition(documents: Sequence[Document]) -> list[list[Document]]:
    """Documents in order, cut into shards of about `SHARD_TOKENS` tokens learnt from."""
    shards: list[list[Document]] = []
    total = SHARD_TOKENS
    for document in documents:
        if total >= SHARD_TOKENS:
            shards.append([])
            total = 0
        shards[-1].append(document)
        total += len(document.tokens) - document.skip
    return shards


def fill(folder: Path, name: str, shards: Sequence[Sequence[Document]], model: LowerModel) -> Iterator[int]:
    """Make the shards of `name` that are missing and that nobody else is making; yields the number of each one done."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, documents in enumerate(shards):
        path = folder / f"{name}-{i:03d}.safetensors"
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if not path.exists():
                    partial = path.with_suffix(".part")
                    save_file(_activations(documents, model), partial)
                    partial.rename(path)
        except Timeout:
            continue  # Another process has it.
        yield i


def _activations(documents: Sequence[Document], model: LowerModel) -> dict[str, torch.Tensor]:
    parts: dict[int, torch.Tensor] = {}
    by_length = sorted(range(len(documents)), key=lambda i: len(documents[i].tokens))
    while by_length:
        n = max(1, _BATCH_TOKENS // len(documents[by_length[-1]].tokens))
        batch, by_length = by_length[-n:], by_length[:-n]
        for i, h_TD in zip(batch, model([documents[i] for i in batch]), strict=True):
            parts[i] = h_TD[documents[i].skip :].half()
    order = range(len(documents))
    return {
        "h": torch.cat([parts[i] for i in order]),
        "token": torch.cat([torch.tensor(documents[i].tokens[documents[i].skip :], dtype=torch.int32) for i in order]),
        "position": torch.cat([torch.arange(d.skip, len(d.tokens), dtype=torch.int32) for d in documents]),
        "document": torch.cat([torch.full((len(parts[i]),), i, dtype=torch.int32) for i in order]),
        "chat": torch.cat([torch.full((len(parts[i]),), documents[i].kind != "text") for i in order]),
    }


def read_shard(path: Path, median_norm: float | None = None) -> Shard:
    """The shard at `path` without its sinks: norm above `SINK_RATIO` × the median (the shard's own unless given)."""
    tensors = load_file(path)
    norm_T = torch.linalg.vector_norm(tensors["h"].float(), dim=1)
    keep_T = norm_T <= SINK_RATIO * (median_norm or float(norm_T.median()))
    return Shard(**{name: value[keep_T] for name, value in tensors.items()}, n_sinks=int((~keep_T).sum()))
