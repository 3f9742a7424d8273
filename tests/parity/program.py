"""Tests whose engine needs a process of its own: a program prints what it found as one line of JSON, a test reads it."""

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["found", "say"]

_MARK = "FOUND "
_SECONDS = 1800


def say(finding: dict[str, Any]) -> None:
    """In the program: what it found."""
    sys.stdout.write(f"\n{_MARK}{json.dumps(finding)}\n")


def found(module: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """In the test: what `python -m module` found with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    lines = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    assert (done.returncode, len(lines)) == (0, 1), done.stderr[-4000:]
    finding: dict[str, Any] = json.loads(lines[0])
    return finding
