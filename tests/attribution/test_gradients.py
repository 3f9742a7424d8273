"""Gradients on the real model: alone, in a batch, and by finite differences; and the scores made of them."""

from __future__ import annotations

import pytest
import torch

from trimtab.attribution.gradients import Factors, Pass, Tracing, batches, losses, positions, trace
from trimtab.attribution.model import SplitModel, pad
from trimtab.attribution.moments import Firings, Moments
from trimtab.attribution.pairs import Completion
from trimtab.attribution.sae import SAE
from trimtab.attribution.scores import naive_project, row_coefficients, score
from trimtab.attribution.validation import Margins

NORM = 155.0
"""About the median ‖h‖ of the embedded model at block 14."""


ALL = Tracing("all", {14: NORM})


def of(found: Pass, i: int, layer: int = 14) -> Factors:
    factors = found.factors[layer]
    return Factors(*(t[factors.of_N == i] for t in factors))


def test_a_batch_gives_each_completion_its_own_gradient(model: SplitModel, completions: list[Completion]) -> None:
    assert len({len(c.ids) for c in completions}) > 1
    together = trace(model, completions, range(len(completions)), ALL)
    for i in range(len(completions)):
        alone = trace(model, completions, [i], ALL)
        assert together.loss[i] == pytest.approx(alone.loss[i], rel=1e-5)
        (a, g, _), (a_alone, g_alone, _) = of(together, i), of(alone, i)
        assert float((a - a_alone).norm() / a_alone.norm()) < 1e-5
        assert float((g - g_alone).norm() / g_alone.norm()) < 1e-4


def test_batches_hold_like_lengths_and_no_more_tokens_than_asked(completions: list[Completion]) -> None:
    longest = max(len(c.ids) for c in completions)
    found = list(batches(completions, 2 * longest))
    assert sorted(i for batch in found for i in batch) == list(range(len(completions)))
    for batch in found:
        assert len(batch) * max(len(completions[i].ids) for i in batch) <= 2 * longest
    lengths = [len(completions[i].ids) for batch in found for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches(completions, 1)] == [1] * len(completions)


def test_one_pass_gives_the_gradient_at_every_hook_point(model: SplitModel, completions: list[Completion]) -> None:
    several = SplitModel(model._model, model.identity, 10, [14, 20])
    found = trace(several, completions, [0, 1], Tracing("completion", {10: NORM, 14: NORM, 20: 3 * NORM}))
    for layer in (10, 14, 20):
        norms = {layer: 3 * NORM if layer == 20 else NORM}
        alone = trace(model.at(layer), completions, [0, 1], Tracing("completion", norms)).factors[layer]
        torch.testing.assert_close(found.factors[layer].of_N, alone.of_N)
        assert float((found.factors[layer].a_ND - alone.a_ND).norm() / alone.a_ND.norm()) < 1e-5
        assert float((found.factors[layer].g_ND - alone.g_ND).norm() / alone.g_ND.norm()) < 1e-4


def test_no_weight_gets_a_gradient(model: SplitModel, completions: list[Completion]) -> None:
    trace(model, completions, [0], ALL)
    assert not any(weight.requires_grad or weight.grad is not None for weight in model._model.parameters())


def test_the_gradient_is_the_slope_of_the_loss(model: SplitModel, completions: list[Completion]) -> None:
    completion = completions[0]
    h = model.lower(pad([completion])).requires_grad_()
    (g,) = torch.autograd.grad(losses(model, h, [completion]).sum(), h)
    g[:, 0] = 0  # The sink: a step there is on another scale.
    step = 0.05 * g / g.norm() * NORM

    def loss(h: torch.Tensor) -> float:
        with torch.no_grad():
            return float(losses(model, h, [completion]))

    slope = (loss(h + step) - loss(h - step)) / 2
    assert slope == pytest.approx(float((g * step).sum()), rel=0.05)
    assert abs(slope) > 1e-3


def test_positions_are_those_that_predict_the_completion(completions: list[Completion]) -> None:
    completion = Completion(tuple(range(10)), n_prompt=6)
    assert list(range(10))[positions(completion, "completion")] == [5, 6, 7, 8]
    assert list(range(10))[positions(completion, "all")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert positions(Completion((1, 2), n_prompt=1), "completion") == slice(1, 1)


def test_sinks_and_tokens_left_alone_are_in_no_pass(model: SplitModel, completions: list[Completion]) -> None:
    completion = completions[0]
    h = model.lower(pad([completion]))[0]
    assert float(h[0].norm()) > 50 * NORM
    kept = trace(model, completions, [0], ALL).factors[14]
    assert float(kept.a_ND.norm(dim=1).max()) < 6 * NORM
    assert len(kept.a_ND) == len(completion.ids) - 2
    assert len(trace(model, completions, [0], Tracing("all", {14: 1.0})).factors[14].a_ND) == 0
    turn = completion.ids[completion.n_prompt - 3]
    left = trace(model, completions, [0], Tracing("all", {14: NORM}, left_alone=frozenset([turn]))).factors[14]
    assert len(left.a_ND) == len(kept.a_ND) - completion.ids[1:-1].count(turn) < len(kept.a_ND)


def moments_of(
    model: SplitModel, sae: SAE, completions: list[Completion]
) -> tuple[list[Factors], Moments, Firings, torch.Tensor]:
    assert sae.stats is not None
    tracing = Tracing("completion", {14: sae.stats.resid_norm})
    passes = [trace(model, completions, batch, tracing).factors[14] for batch in batches(completions, 400)]
    n_pairs, mean = len(completions) // 2, sae.stats.mean_D
    return passes, Moments.over(passes, mean, n_pairs), Firings.over(passes, sae, n_pairs), mean


def test_the_quadratic_form_is_the_naive_sum_on_the_real_sae(
    model: SplitModel, sae: SAE, completions: list[Completion]
) -> None:
    passes, moments, firings, mean = moments_of(model, sae, completions[:4])
    found = score(moments, firings, sae, "project", torch.zeros(sae.d_sae), mean)
    naive = naive_project(passes, sae, mean, 2)
    assert float((found.project_L - naive).abs().max() / naive.abs().max()) < 1e-5


def test_the_score_predicts_a_small_intervention(model: SplitModel, sae: SAE, completions: list[Completion]) -> None:
    """The 20 latents of largest score ablated by a tenth: the margin moves by a tenth of what was predicted."""
    _, moments, firings, mean = moments_of(model, sae, completions)
    amounts = torch.zeros(sae.d_sae)
    scores = score(moments, firings, sae, "ablate", amounts, mean)
    latents = scores.operation_L.topk(20).indices.tolist()
    alpha, beta = row_coefficients("ablate", amounts[latents])
    pairs = list(zip(completions[0::2], completions[1::2], strict=True))
    effect = Margins(model, pairs, [str(i) for i in range(len(pairs))], "completion").effect(
        sae.rows(latents, 0.1 * alpha, 0.1 * beta)
    )
    assert effect.mean == pytest.approx(-0.1 * float(scores.operation_L[latents].sum()), rel=0.15)
