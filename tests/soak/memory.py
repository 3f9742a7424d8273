"""The resident memory of a server's processes while it works, and how fast it grows."""

from typing import NamedTuple

import numpy as np

from tests import processes as kernel

__all__ = ["Growth", "Memory", "processes"]


_HEAVY_MIB = 200


class Growth(NamedTuple):
    """Of one process, in MiB."""

    name: str
    at_half: float
    """When half of the requests had been answered."""
    at_end: float
    slope: float
    """Of the least-squares line through the second half, per 1,000 requests."""


class Memory:
    """Samples of (requests answered, resident MiB), process by process."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.samples: list[tuple[int, dict[str, float]]] = []

    def sample(self, n_answered: int) -> None:
        """Look at every process now."""
        self.samples.append((n_answered, {name: kernel.resident_mib(pid) for name, pid in self._pids.items()}))

    def growth(self) -> list[Growth]:
        """Of every process, over the second half of the requests."""
        total = self.samples[-1][0]
        late = [sample for sample in self.samples if sample[0] >= total / 2]
        n = np.array([count for count, _ in late], float)
        found = []
        for name in self._pids:
            mib = np.array([by_name[name] for _, by_name in late])
            slope = float(np.polyfit(n, mib, 1)[0]) * 1000 if len(set(n)) > 1 else 0.0
            found.append(Growth(name, float(mib[0]), float(mib[-1]), slope))
        return found


def processes(server: int) -> dict[str, int]:
    """The server's own process and those that it started and that hold a model or a scheduler: name → pid."""
    heavy = (pid for pid in kernel.descendants(server) if kernel.resident_mib(pid) > _HEAVY_MIB)
    return {"service": server, **{kernel.name(pid): pid for pid in heavy}}
