"""A process whose pages were gathered goes on with what it had in them."""

import subprocess
import sys

from tests.bench.pages import can_gather, gather

_PROGRAM = """
held = bytearray(range(256)) * (64 * 2**12)  # 64 MiB, each page touched
print("ready", flush=True)
input()
print(held == bytearray(range(256)) * (64 * 2**12))
"""


def test_gathered_memory_is_what_it_was() -> None:
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        mebibytes = gather(process.pid)
        assert (mebibytes >= 32) if can_gather() else (mebibytes == 0)
        said, _ = process.communicate("\n")
    assert said == "True\n"
