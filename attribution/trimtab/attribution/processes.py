"""The processes of one run: one, or those that `torchrun` started, on one machine or several.

Each takes every n-th pass over the model and every n-th intervention, and reads only what it wrote; sums of D × D a hook point,
a few vectors over the latents and the numbers of the interventions are all that they exchange.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

__all__ = ["Processes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Which of them this is."""

    rank: int = 0
    size: int = 1
    sharing: bool = True
    """Whether each takes a part of the data; with tensor parallelism all see all of it, each with a part of the model."""

    @classmethod
    @contextmanager
    def joined(cls, *, tensor_parallel: bool = False) -> Iterator[Processes]:
        """This process among those of `torchrun`; alone without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls()
            return
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield cls(distributed.get_rank(), size, sharing=not tensor_parallel)
        finally:
            distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share."""
        return items[self.rank :: self.size] if self.sharing else items

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            distributed.barrier()

    def add_up(self, *sums: Tensor) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1 and self.sharing:
            for tensor in sums:
                distributed.all_reduce(tensor)

    def collect(self, mine: list[T]) -> list[T]:
        """What all processes have of a list that `part` shared out, in its order."""
        if self.size == 1 or not self.sharing:
            return mine
        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, mine)
        return [every[i % self.size][i // self.size] for i in range(sum(map(len, every)))]
