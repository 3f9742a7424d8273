"""Gradients on the real model: alone, in a batch, and by finite differences; and the scores made of them."""

from __future__ import annotations

import pytest
import torch

from trimtab.attribution.gradients import losses, positions, traces
from trimtab.attribution.model import SplitModel, pad
from trimtab.attribution.pairs import Completion
from trimtab.attribution.sae import SAE
from trimtab.attribution.scores import Sums, naive_project, row_coefficients, score
from trimtab.attribution.validation import Margins

NORM = 155.0
"""About the median ‖h‖ of the embedded model at block 14."""


def test_a_batch_gives_each_completion_its_own_gradient(model: SplitModel, completions: list[Completion]) -> None:
    assert len({len(c.ids) for c in completions}) > 1
    together = traces(model, completions, scope="all", resid_norm=NORM, batch_size=len(completions))
    for completion, batched in zip(completions, together, strict=True):
        (alone,) = traces(model, [completion], scope="all", resid_norm=NORM)
        assert batched.loss == pytest.approx(alone.loss, rel=1e-5)
        assert float((batched.a_ND - alone.a_ND).norm() / alone.a_ND.norm()) < 1e-5
        assert float((batched.g_ND - alone.g_ND).norm() / alone.g_ND.norm()) < 1e-4


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


def test_sinks_are_in_no_trace(model: SplitModel, completions: list[Completion]) -> None:
    h = model.lower(pad(completions[:1]))[0]
    assert float(h[0].norm()) > 50 * NORM
    (trace,) = traces(model, completions[:1], scope="all", resid_norm=NORM)
    assert float(trace.a_ND.norm(dim=1).max()) < 6 * NORM
    (nothing,) = traces(model, completions[:1], scope="all", resid_norm=1.0)
    assert len(nothing.a_ND) == 0


def test_the_quadratic_form_is_the_naive_sum_on_the_real_sae(
    model: SplitModel, sae: SAE, completions: list[Completion]
) -> None:
    assert sae.stats is not None
    found = traces(model, completions[:4], scope="completion", resid_norm=sae.stats.resid_norm)
    shows, lacks, mean = found[0::2], found[1::2], sae.stats.mean_D
    scores = score(Sums.over(shows, sae, mean), Sums.over(lacks, sae, mean), sae, "project", torch.zeros(sae.d_sae))
    naive = naive_project(shows, sae, mean) - naive_project(lacks, sae, mean)
    assert float((scores.project_L - naive).abs().max() / naive.abs().max()) < 1e-5


def test_the_score_predicts_a_small_intervention(model: SplitModel, sae: SAE, completions: list[Completion]) -> None:
    """The 20 latents of largest score ablated by a tenth: the margin moves by a tenth of what was predicted."""
    assert sae.stats is not None
    found = traces(model, completions, scope="completion", resid_norm=sae.stats.resid_norm)
    amounts = torch.zeros(sae.d_sae)
    scores = score(
        Sums.over(found[0::2], sae, sae.stats.mean_D),
        Sums.over(found[1::2], sae, sae.stats.mean_D),
        sae,
        "ablate",
        amounts,
    )
    latents = scores.operation_L.topk(20).indices.tolist()
    alpha, beta = row_coefficients("ablate", amounts[latents])
    pairs = list(zip(completions[0::2], completions[1::2], strict=True))
    effect = Margins(model, pairs, [str(i) for i in range(len(pairs))], "completion").effect(
        sae.rows(latents, 0.1 * alpha, 0.1 * beta)
    )
    assert effect.mean == pytest.approx(-0.1 * float(scores.operation_L[latents].sum()), rel=0.15)
