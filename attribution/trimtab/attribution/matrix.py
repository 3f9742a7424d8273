"""The rows of an SAE's encoder or decoder, read from where they lie: memory-mapped, in the file's dtype, folded on the way out.

    row_i = W_i · scale_i   (and minus its own mean, where the SAE reads a centred stream)

Two million latents of width 4,096 are 32 GB in fp32; nothing here holds more than a block of them at a time.

Axes: D d_model, L latents, K chosen latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLOCK", "Matrix", "Stored", "blocks", "norms"]

BLOCK = 16_384
"""Latents that are read at a time: 64 MB of fp32 at d_model 1,024."""


@dataclass(frozen=True)
class Stored:
    """A matrix [L, D] as a file holds it; indexing gives fp32 rows with the scales folded in."""

    W_LD: Tensor
    """A view of the mapped file, transposed where the file is [D, L]; any float dtype."""
    scale_L: Tensor | None = None
    centred: bool = False
    """Whether each row loses its mean: e · (h − mean(h)) = (e − mean(e)) · h."""

    @property
    def shape(self) -> torch.Size:
        """[L, D]."""
        return self.W_LD.shape

    def __len__(self) -> int:
        return len(self.W_LD)

    def __getitem__(self, index: slice | int | list[int] | Tensor) -> Tensor:
        row_KD = self.W_LD[index].float()
        if self.centred:
            row_KD = row_KD - row_KD.mean(dim=-1, keepdim=True)
        if self.scale_L is not None:
            row_KD = row_KD * self.scale_L[index].unsqueeze(-1)
        return row_KD


Matrix = Tensor | Stored
"""What an SAE's rows are: in memory, or where the file has them."""


def blocks(matrix: Matrix, size: int = BLOCK) -> Iterator[slice]:
    """Slices over all latents, `size` at a time."""
    for start in range(0, len(matrix), size):
        yield slice(start, min(start + size, len(matrix)))


def norms(matrix: Matrix) -> Tensor:
    """‖row‖ [L]."""
    return torch.cat([matrix[block].norm(dim=1) for block in blocks(matrix)])
