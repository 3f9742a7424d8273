"""The edit as CUDA graphs need it gives the answers of transformers, in the real engine on the host, under both model runners."""

import pytest

from tests.parity.program import found

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("runner", "computed_by", "n_tokens", "n_drafts"),
    [("v1", "torch", 6, 0), ("v1", "torch", 24, 3), ("v2", "triton", 4, 0)],
)
def test_a_mixed_batch_equals_transformers(runner: str, computed_by: str, n_tokens: int, n_drafts: int) -> None:
    counts = ("--tokens", str(n_tokens), "--drafts", str(n_drafts))
    answer = found("tests.parity.on_device", runner, *counts, TRITON_INTERPRET=str(int(computed_by == "triton")))
    assert (answer["runner"], answer["computed_by"]) == (runner, computed_by)
    assert answer["same"]
    assert max(answer["worst_steered"], answer["worst_unsteered"], answer["norms"]) <= 1e-4
    assert (answer["requests"], answer["changed"]) == (21, 18)
    assert min(answer["gate_firings"], answer["special_tokens"]) > 0
