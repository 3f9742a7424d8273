"""Gates that stay open: at which position each of them first opened, in each request.

    forget(start)   before a step: what opened at `start` or later is computed again, after a preemption, say
    opened_S        in the step: every layer's work lowers its entries to the first position on which a gate fires

The state is a position, not a flag, so that chunks, preemption and recomputation all give the answer of one undisturbed pass; it
lives on the device, so no step waits for the one before. Entry 0 belongs to nobody. Axis: S entries.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from trimtab.server.plan import Gate, PlanRow, Window

__all__ = ["NEVER", "Onward", "Watch"]

NEVER = 1 << 62
"""Larger than any position."""


class Watch(NamedTuple):
    """What one entry belongs to, within a request: a gate, and the tokens on which it is read."""

    layer: int
    gate: Gate
    window: Window
    exclude_special: bool

    @classmethod
    def of(cls, row: PlanRow) -> "Watch | None":
        """The watch of a row; None unless it is gated `onward`."""
        if row.gate is None or not row.is_onward:
            return None
        return cls(row.layer, row.gate, row.window, row.exclude_special)


class Onward:
    """The entries of one worker."""

    def __init__(self, device: torch.device, size: int = 64, *, grows: bool = True) -> None:
        self.opened_S = torch.full((size,), NEVER, dtype=torch.int64, device=device)
        self._free = list(range(size - 1, 0, -1))
        self._grows = grows
        """A CUDA graph keeps the address of what it was captured with."""

    @property
    def n_taken(self) -> int:
        """Entries that belong to a request."""
        return len(self.opened_S) - 1 - len(self._free)

    def take(self, watches: Iterable[Watch]) -> dict[Watch, int]:
        """An entry for each watch, not opened yet.

        Raises:
            LookupError: there is none left, and no room may be made.
        """
        taken: dict[Watch, int] = {}
        for watch in watches:
            if not self._free and not self._grows:
                self.give(taken.values())
                raise LookupError(
                    f"the requests in flight hold as many gates that stay open as fit, {len(self.opened_S) - 1}"
                )
            if not self._free:
                size = len(self.opened_S)
                self.opened_S = torch.cat([self.opened_S, torch.full_like(self.opened_S, NEVER)])
                self._free = list(range(2 * size - 1, size - 1, -1))
            taken[watch] = self._free.pop()
            self.opened_S[taken[watch]] = NEVER
        return taken

    def give(self, entries: Iterable[int]) -> None:
        """Entries of a request that is gone."""
        self._free += entries

    def forget(self, entries: Sequence[int], starts: Sequence[int]) -> None:
        """Entries that opened at their start or later have not opened yet."""
        both = torch.tensor([entries, starts], dtype=torch.int64, pin_memory=self.opened_S.is_cuda)
        index, start = both.to(self.opened_S.device, non_blocking=True)
        opened = self.opened_S[index]
        self.opened_S[index] = torch.where(opened < start, opened, NEVER)
