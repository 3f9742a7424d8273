"""Tests that need a GPU: `make test-gpu` runs them, and nothing else does. Without one they fail and say so; none is skipped."""

from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in here is marked `cuda`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(autouse=True)
def gpu() -> str:
    """The name of the GPU."""
    if not torch.cuda.is_available():
        pytest.fail("these tests need an NVIDIA GPU and the CUDA build: make EXTRAS=cuda,dev test-gpu")
    return str(torch.cuda.get_device_name())
