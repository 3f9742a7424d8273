"""The cores that an engine's processes run on, and the CPU time that they use.

CPU time is the kernel's own account (`/proc/PID/task/*/schedstat`), of the process that runs the model (vLLM's worker) and of all
of the engine's processes together.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests import processes
from tests.processes import descendants, name

__all__ = ["Clocks", "aside", "cpu_seconds", "models", "part_cores"]


def part_cores() -> None:
    """Give vLLM's worker a core of its own, and the rest to the others, who poll without end.

    vLLM means to bind its worker, by GOMP_CPU_AFFINITY, but libgomp does not bind a lone thread: it shares a core with whoever
    polls, and moves from one to the other.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    pids = (os.getpid(), *descendants(os.getpid()))
    workers = _workers(pids)
    for pid in pids if others and len(workers) == 1 else ():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), [first] if pid in workers else others)


@contextmanager
def aside() -> Iterator[None]:
    """Meanwhile this process keeps off the core that the engines' workers have."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[1:] or allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _workers(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if name(pid).startswith("VLLM::Worker")]


def models(pids: Sequence[int]) -> list[int]:
    """Those of an engine's processes, its own first, that run the model."""
    return _workers(pids) or [pid for pid in pids if name(pid).startswith("VLLM::")] or [pids[0]]


class Clocks:
    """Wall time, and the CPU time of the model's process and of all of this engine's."""

    def __init__(self) -> None:
        self._pids = (os.getpid(), *descendants(os.getpid()))
        self._workers = models(self._pids)
        self._before = self._read()
        self.start = time.perf_counter()

    def read(self) -> tuple[float, float, float]:
        """(wall, worker's CPU, all CPU) seconds since the start."""
        seconds = time.perf_counter() - self.start
        worker, total = (now - then for now, then in zip(self._read(), self._before, strict=True))
        return seconds, worker, total

    def _read(self) -> tuple[float, float]:
        return sum(map(processes.cpu_seconds, self._workers)), sum(map(processes.cpu_seconds, self._pids))


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process and all below it have used so far."""
    return sum(processes.cpu_seconds(each) for each in (pid, *descendants(pid)))
