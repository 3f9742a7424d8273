"""Where a latent fires: the examples that ship with the SAE, and, token by token, those of the pairs."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trimtab.attribution.errors import SAEError
from trimtab.attribution.gradients import batches, positions
from trimtab.attribution.model import SplitModel, pad
from trimtab.attribution.pairs import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trimtab.attribution.bundle import Bundle

__all__ = ["Example", "of_pairs", "of_sae"]

AROUND = 10
"""Tokens shown on either side of the strongest."""


class Example(NamedTuple):
    """A piece of text with the latent's activation on each token."""

    activation: float
    """The largest, SAE units."""
    tokens: list[tuple[str, float]]
    """(text, activation); an example that ships with an SAE knows the strongest token's alone."""


def of_sae(folder: Path, latents: Sequence[int]) -> dict[int, list[Example]]:
    """The examples in `top_contexts.jsonl.gz` beside an SAE; nothing where there is no such file.

    Raises:
        SAEError: the file is damaged.
    """
    file = folder / "top_contexts.jsonl.gz"
    if not file.is_file():
        return {}
    try:
        entries = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
        return {
            entry["latent"]: [
                Example(float(a), [(before, 0.0), (token, float(a)), (after, 0.0)])
                for a, before, token, after in entry["top"]
            ]
            for entry in entries
            if entry["latent"] in latents
        }
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as e:
        raise SAEError(f"{file} is damaged ({e}); fetch it again, or remove it") from e


@torch.no_grad()
def of_pairs(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    bundle: Bundle,
    completions: Sequence[Completion],
    *,
    n: int = 3,
) -> dict[int, list[Example]]:
    """The n completions on which each latent of the bundle fires most, around the strongest token."""
    e_KD, b_K = torch.from_numpy(bundle.encoder), torch.from_numpy(bundle.bias)
    theta_K = torch.from_numpy(bundle.threshold)
    found: list[list[tuple[float, int, Tensor]]] = [[] for _ in bundle.header.latents]
    for batch in batches(completions, 16):
        h_BTD = model.lower(pad([completions[i] for i in batch]))
        for row, i in enumerate(batch):
            window = positions(completions[i], "all")
            x_TK = h_BTD[row, window].float() @ e_KD.T + b_K
            phi_TK = torch.where(x_TK > theta_K, x_TK, 0.0)
            for k, top in enumerate(phi_TK.amax(0).tolist()):
                if top > 0:
                    found[k].append((top, i, phi_TK[:, k]))
    out: dict[int, list[Example]] = {}
    for record, candidates in zip(bundle.header.latents, found, strict=True):
        best = sorted(candidates, key=lambda c: -c[0])[:n]
        out[record.latent] = [_example(tokenizer, completions[i], phi_T) for _, i, phi_T in best]
    return out


def _example(tokenizer: Any, completion: Completion, phi_T: Tensor) -> Example:
    first = positions(completion, "all").start
    top = int(phi_T.argmax())
    lo, hi = max(0, top - AROUND), min(len(phi_T), top + AROUND + 1)
    tokens = [(str(tokenizer.decode([completion.ids[first + t]])), float(phi_T[t])) for t in range(lo, hi)]
    return Example(float(phi_T[top]), tokens)
