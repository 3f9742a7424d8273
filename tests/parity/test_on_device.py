"""The edit as CUDA graphs need it gives the answers of transformers, in the real engine on the host, under both model runners."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def found(*arguments: str, **environment: str) -> dict[str, Any]:
    """What `tests.parity.on_device` found with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.on_device", *arguments],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert (done.returncode, len(lines)) == (0, 1), done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(lines[0])
    return answer


@pytest.mark.parametrize(
    ("runner", "computed_by", "n_tokens", "n_drafts"),
    [("v1", "torch", 6, 0), ("v1", "torch", 24, 3), ("v2", "triton", 4, 0)],
)
def test_a_mixed_batch_equals_transformers(runner: str, computed_by: str, n_tokens: int, n_drafts: int) -> None:
    counts = ("--tokens", str(n_tokens), "--drafts", str(n_drafts))
    answer = found(runner, *counts, TRITON_INTERPRET=str(int(computed_by == "triton")))
    assert (answer["runner"], answer["computed_by"]) == (runner, computed_by)
    assert answer["same"]
    assert max(answer["worst_steered"], answer["worst_unsteered"], answer["norms"]) <= 1e-4
    assert (answer["requests"], answer["changed"]) == (21, 18)
    assert min(answer["gate_firings"], answer["special_tokens"]) > 0
