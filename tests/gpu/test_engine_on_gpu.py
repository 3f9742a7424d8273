"""The real engine on a GPU beside transformers: each kind of graph, both runners, bf16, tensor parallel; and idle steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.program import found

OUT = Path("build/gpu")
MODES = ("NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL", "FULL_AND_PIECEWISE")


def ask(*arguments: str) -> dict[str, Any]:
    answer = found("tests.parity.on_device", *arguments, "--cuda", "--tokens", "12")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"parity-{'-'.join(a.strip('-') for a in arguments)}.json").write_text(json.dumps(answer))
    return answer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_mixed_batch_equals_transformers_in_fp32(runner: str, mode: str) -> None:
    answer = ask(runner, "--graphs", mode)
    assert (answer["runner"], answer["computed_by"]) == (runner, "triton")
    assert answer["same"]
    assert max(answer["worst_steered"], answer["worst_unsteered"], answer["norms"]) <= 1e-3
    assert answer["changed"] == 18


@pytest.mark.parametrize("mode", ["NONE", "FULL_AND_PIECEWISE"])
def test_in_bf16_steering_adds_no_error_of_its_own(mode: str) -> None:
    """Rounding moves every log-probability, steered or not; steered ones must not be moved more than some times as far."""
    answer = ask("v2", "--graphs", mode, "--dtype", "bfloat16")
    assert answer["worst_steered"] <= 4 * answer["worst_unsteered"] + 0.02
    assert answer["changed"] == 18


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_two_gpus_equal_transformers(runner: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.fail("tensor parallelism needs two GPUs; leave this test out with: -k 'not two_gpus'")
    answer = ask(runner, "--graphs", "FULL_AND_PIECEWISE", "--tensor-parallel", "2")
    assert answer["same"]
    assert max(answer["worst_steered"], answer["worst_unsteered"], answer["norms"]) <= 1e-3


def profiled(runner: str, plugin: bool) -> dict[str, Any]:
    """What `tests.gpu.profile` saw of one engine."""
    environment = {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))} | ({} if plugin else {"VLLM_PLUGINS": ""})
    answer = found("tests.gpu.profile", "plugin" if plugin else "plain", **environment)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"profile-{runner}-{'plugin' if plugin else 'plain'}.json").write_text(json.dumps(answer))
    return answer


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_idle_steps_launch_exactly_what_an_engine_without_the_plugin_launches(runner: str) -> None:
    """And two variants of each graph cost memory and seconds: both are in build/gpu/profile-*.json."""
    plain, ours = profiled(runner, plugin=False), profiled(runner, plugin=True)
    assert ours["idle"]["edits"] == 0
    assert ours["idle"]["kernels"] == plain["idle"]["kernels"]
    assert ours["steered"]["edits"] == ours["layers"] * ours["steps"]
