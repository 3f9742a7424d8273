"""What the kernel says of a server's processes: for tests, soaks and benchmarks. Linux."""

import os
from pathlib import Path

WITHIN = 10.0 if "PYTEST_XDIST_WORKER" in os.environ else 1.0
"""Seconds within which every replica goes by a change: one, where a test has the machine to itself; `make test` runs another
engine on the same cores, which may hold up each step, and there the test is of what happens and not of when."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these started."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(children).split():
            found += [int(child), *descendants(int(child))]
    return found


def runs(pid: int) -> bool:
    """Whether a process is there, and more than a zombie."""
    state = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] != "Z"


def name(pid: int) -> str:
    """What it calls itself."""
    return _read(Path(f"/proc/{pid}/cmdline")).partition("\0")[0].strip()


def resident_mib(pid: int) -> float:
    """Its resident memory; 0 when it is gone."""
    pages = _read(Path(f"/proc/{pid}/statm")).split()
    return int(pages[1]) * _PAGE / 2**20 if pages else 0.0


def cpu_seconds(pid: int) -> float:
    """What its living threads have used."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(used[0]) for task in tasks if (used := _read(task).split())) / 1e9


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
