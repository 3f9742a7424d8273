"""The Triton kernel is the reference formula, in its interpreter; and it compiles for the GPUs that are named in docs/gpu.md."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.server.engine.kernel_cases import CASES


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.engine.kernel_cases"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_edited_rows_are_the_reference_and_others_are_untouched(findings: dict[str, Any], case: Any) -> None:
    found = findings[case.name]
    # fp32: the order of sums over the width. Half precision: one rounding of the same fp32 number, at most one step apart.
    allowed = 16 if case.dtype == "float32" else 1.01
    assert found["reference"] <= allowed
    assert found["torch"] <= allowed
    assert found["untouched"]
    assert found["beyond"]
    assert found["edited"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_row_tells_its_relative_norm(findings: dict[str, Any], case: Any) -> None:
    assert findings[case.name]["ratio"] <= 1e-5
    assert findings[case.name]["ratio_of_torch"] <= 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gates_and_special_tokens_are_flagged_and_remembered(findings: dict[str, Any], case: Any) -> None:
    found = findings[case.name]
    assert (found["flags"], found["flags_of_torch"], found["opened"]) == (True, True, True)


def test_a_norm_of_nan_stays_nan(findings: dict[str, Any]) -> None:
    assert findings["nan"] == "nan"


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_a_gpu_without_spilling(capability: int) -> None:
    """No GPU is needed to compile for one: what the interpreter takes and the compiler does not, shows here."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.engine.kernel_compiled", str(capability)],
        env={**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert all("STACK:0" in line and "LOCAL:0" in line for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 4
