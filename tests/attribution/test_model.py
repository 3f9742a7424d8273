"""The model cut in two is the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.attribution.edit import Rows, delta
from trimtab.attribution.embedded import model_path
from trimtab.attribution.errors import ModelError
from trimtab.attribution.gradients import positions
from trimtab.attribution.model import SplitModel, pad
from trimtab.attribution.pairs import Completion
from trimtab.attribution.uncertainty import clustered_se
from trimtab.attribution.validation import Margins

LAYER = 14


@pytest.fixture(scope="module")
def whole() -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    return model.requires_grad_(False).train(False)


def test_both_halves_together_are_the_whole_model(model: SplitModel, whole: Any, completions: list[Completion]) -> None:
    ids = torch.tensor([completions[0].ids])
    h = model.lower(ids)
    out = whole(ids, output_hidden_states=True)
    torch.testing.assert_close(h, out.hidden_states[LAYER + 1], rtol=1e-5, atol=1e-3)
    with torch.no_grad():
        logits = model.logits(model.upper(h)[0])
    torch.testing.assert_close(logits, out.logits[0], rtol=1e-5, atol=1e-3)


def test_the_effect_of_an_edit_is_that_of_a_hook_in_the_whole_model(
    model: SplitModel, whole: Any, completions: list[Completion]
) -> None:
    """Cached streams, upper blocks, padding and skipped completions against one plain forward per completion."""
    generator = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(2, model.identity.d_model, generator=generator), dim=1)
    rows = Rows(torch.tensor([15.0, 0.0]), torch.tensor([0.0, -2.0]), d, torch.zeros(2), torch.tensor([0.0, 3.0]), d)
    pairs = [(completions[0], completions[1]), (completions[4], completions[5])]

    def loss(completion: Completion, edited: bool) -> float:
        start = positions(completion, "completion").start

        def hook(module: Any, arguments: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[0, start:] += delta(out[0, start:], rows)
            return out

        handle = whole.model.layers[LAYER].register_forward_hook(hook) if edited else None
        ids = torch.tensor(completion.ids)
        logits = whole(ids[None]).logits[0, completion.n_prompt - 1 : -1]
        if handle is not None:
            handle.remove()
        return float(torch.nn.functional.cross_entropy(logits, ids[completion.n_prompt :]))

    changes = [[loss(c, True) - loss(c, False) for c in pair] for pair in pairs]
    effect = Margins(model, pairs, ["a", "b"], "completion").effect(rows)
    expected = torch.tensor([[negative - positive] for positive, negative in changes])
    assert effect.mean == pytest.approx(float(expected.mean()), abs=1e-4)
    assert effect.se == pytest.approx(float(clustered_se(expected, ["a", "b"])), abs=1e-4)
    assert effect.positive == pytest.approx((changes[0][0] + changes[1][0]) / 2, abs=1e-4)
    assert effect.max_relative_norm > 0.05


def test_tokens_left_alone_are_not_edited(model: SplitModel, completions: list[Completion]) -> None:
    """With every token of a completion left alone nothing is edited; without the last prompt token, something else than all."""
    d = torch.nn.functional.normalize(torch.ones(1, model.identity.d_model), dim=1)
    rows = Rows(torch.tensor([20.0]), torch.zeros(1), d, torch.zeros(1), torch.zeros(1), d)
    pair = (completions[0], completions[1])

    def effect(left_alone: frozenset[int]) -> float:
        return Margins(model, [pair], ["a"], "completion", left_alone).effect(rows).positive

    assert effect(frozenset(pair[0].ids)) == 0.0
    last = pair[0].ids[pair[0].n_prompt - 1]
    assert abs(effect(frozenset([last])) - effect(frozenset())) > 1e-3


def test_an_edit_that_never_fires_changes_nothing_at_all(model: SplitModel, completions: list[Completion]) -> None:
    d = torch.ones(1, model.identity.d_model)
    silent = Rows(torch.zeros(1), torch.tensor([-1.0]), d, torch.zeros(1), torch.tensor([1e9]), d)
    effect = Margins(model, [(completions[0], completions[1])], ["a"], "all").effect(silent)
    assert (effect.mean, effect.positive, effect.negative, effect.max_relative_norm) == (0.0, 0.0, 0.0, 0.0)


def test_no_edits_have_no_effects(model: SplitModel, completions: list[Completion]) -> None:
    """A sweep that goes on meets stretches of which nothing is missing."""
    assert Margins(model, [(completions[0], completions[1])], ["a"], "all").effects([]) == []


def test_padding_is_on_the_right(completions: list[Completion]) -> None:
    ids = pad(completions)
    assert ids.shape == (len(completions), max(len(c.ids) for c in completions))
    assert tuple(ids[1, : len(completions[1].ids)].tolist()) == completions[1].ids


def test_a_layer_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match="layer 30 is outside the 30 layers"):
        SplitModel.load("smollm2-135m-instruct", 30)


def test_a_model_that_is_nowhere_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError) as error:
        SplitModel.load("/nowhere/at/all", 3)
    assert "/nowhere/at/all" in str(error.value)
    assert "\n" not in str(error.value)
