"""The pages of memory that a process was given, gathered into huge ones.

A forward reads all weights, far more than any cache or TLB holds, so its time depends on which pages the kernel gave: of four
engines started one after another the first, on a machine that has run for a while, had its weights in 6,400 different 2 MiB
frames and was 2.5 % slower than the last, in 1,100, whichever program it was. Gathered, they are alike (docs/log.md).
"""

import ctypes
import os
from pathlib import Path

__all__ = ["can_gather", "gather"]

_HUGE = 2 * 2**20
_PROCESS_MADVISE, _MADV_COLLAPSE = 440, 25
"""process_madvise(2), Linux 5.10, one number on every architecture; MADV_COLLAPSE, Linux 6.1."""
_CAP_SYS_NICE = 23


class _Range(ctypes.Structure):
    """A `struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def can_gather() -> bool:
    """Whether this process may gather the pages of another: CAP_SYS_NICE, which root has, and a kernel that knows how."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    return bool(effective >> _CAP_SYS_NICE & 1) and release >= (6, 1)


def gather(pid: int) -> int:
    """Put the heap and the anonymous memory of a process into huge pages; MiB that now are. What it has not touched is left."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    gathered = 0
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, rights, _, _, _, *file = line.split()
            if not rights.startswith("rw") or file not in ([], ["[heap]"]):
                continue
            begin, end = (int(address, 16) for address in where.split("-"))
            for address in range(-(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE, _HUGE):
                wanted = ctypes.byref(_Range(address, _HUGE))
                one = ctypes.c_size_t(1)
                gathered += libc.syscall(_PROCESS_MADVISE, process, wanted, one, _MADV_COLLAPSE, 0) == _HUGE
    finally:
        os.close(process)
    return gathered * _HUGE // 2**20
