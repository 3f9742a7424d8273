"""Processes that run engine after engine: one of each kind, or the whole table."""

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from tests.parity.architectures.zoo import QUICK, ZOO


class Found(NamedTuple):
    """What `python -m tests.parity.architectures` printed."""

    architectures: list[dict[str, Any]]
    refusals: dict[str, str]
    lora: dict[str, Any]


def run(*arguments: str) -> Found:
    """The findings of a process with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.architectures", *arguments],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines: dict[str, list[dict[str, Any]]] = {"FOUND": [], "REFUSALS": [], "LORA": []}
    for line in done.stdout.splitlines():
        what, _, found = line.partition(" ")
        if what in lines:
            lines[what].append(json.loads(found))
    return Found(lines["FOUND"], *(lines[what][0] if lines[what] else {} for what in ("REFUSALS", "LORA")))


@pytest.fixture(scope="package")
def quick() -> Found:
    return run("--refusals", *QUICK)


@pytest.fixture(scope="package")
def adapters() -> Found:
    return run("--lora")


@pytest.fixture(scope="package")
def every() -> Found:
    return run(*ZOO)
