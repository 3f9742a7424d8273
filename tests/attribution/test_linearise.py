"""RelP's rules: the same numbers forwards, and backwards a gradient that accounts for all of the output."""

from __future__ import annotations

import pytest
import torch

from tests.attribution.tiny import llama
from trimtab.attribution.errors import ModelError
from trimtab.attribution.linearise import relp
from trimtab.attribution.model import SplitModel, pad
from trimtab.attribution.pairs import Completion

IDS = [Completion((5, 9, 70, 31, 8, 44, 2), 3), Completion((5, 9, 70, 60, 61), 3)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    return SplitModel.load(str(llama(tmp_path_factory.mktemp("llama"))), 0)


def test_values_are_the_same_to_the_last_bit(tiny: SplitModel) -> None:
    h = tiny.lower(pad(IDS))
    plain = tiny.upper(h)
    with relp(tiny):
        assert torch.equal(tiny.upper(h), plain)
    assert torch.equal(tiny.upper(h), plain)


def test_relevance_is_conserved(tiny: SplitModel) -> None:
    """With constants for norms, ratios and patterns, and halves for gates, the upper half is linear in h and has no bias: the
    gradient of a logit times h sums to the logit. The plain gradient's does not."""
    h = tiny.lower(pad(IDS)).requires_grad_()

    def relevance() -> tuple[float, float]:
        logit = tiny.logits(tiny.upper(h)[0])[-1, 17]
        (g,) = torch.autograd.grad(logit, h)
        return float(logit.detach()), float((g * h.detach()).sum())

    with relp(tiny):
        logit, total = relevance()
    assert abs(logit) > 0.1
    assert total == pytest.approx(logit, rel=1e-4)
    logit, total = relevance()
    assert total != pytest.approx(logit, rel=0.05)


def test_blocks_of_another_kind_are_refused(tiny: SplitModel) -> None:
    del tiny.upper_blocks[0].mlp.gate_proj  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="RelP's rules are known for Llama-like blocks"), relp(tiny):
        pass
