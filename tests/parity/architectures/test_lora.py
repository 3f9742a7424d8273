"""An adapter and an edit compose, request by request, in one batch."""

import pytest

from tests.parity.architectures.conftest import Found

pytestmark = pytest.mark.slow


def test_a_batch_with_and_without_adapter_and_edit_equals_transformers(adapters: Found) -> None:
    found = adapters.lora
    assert found["requests"] == {"neither": 3, "edit": 15, "adapter": 3, "both": 15}
    assert found["same"]
    assert found["error"] <= 1e-4
    assert min(found["adapter_effect"], found["edit_effect"]) >= 1e-2


def test_each_request_has_the_tokens_that_it_has_alone(adapters: Found) -> None:
    assert adapters.lora["alone_same"]
