"""The scores, by hand on two tokens and three latents, and against their definition on random ones."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.attribution.edit import Operation, Rows, delta
from trimtab.attribution.gradients import Trace
from trimtab.attribution.sae import SAE
from trimtab.attribution.scores import Sums, clustered_se, naive_project, pair_scores, row_coefficients, score

ZERO = torch.zeros(2)


def tiny_sae(d: torch.Tensor, theta: float = 0.0) -> SAE:
    n = len(d)
    return SAE("tiny", "sha256:tiny", 0, d.clone(), torch.zeros(n), torch.full((n,), theta), d, None, {})


def random_traces(n: int, d_model: int, seed: int) -> list[Trace]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Trace(torch.randn(5 + i, d_model, generator=generator), torch.randn(5 + i, d_model, generator=generator), 1.0)
        for i in range(n)
    ]


def test_two_tokens_by_hand() -> None:
    """a = (2, 0), (0, 4); g = (−1, 0), (0, −0.5): loss falls along what is there, so removing it costs 2 and 2."""
    sae = tiny_sae(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    shows = [Trace(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[-1.0, 0.0], [0.0, -0.5]]), 1.0)]
    lacks = [Trace(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2), 1.0)]
    positive, negative = Sums.over(shows, sae, ZERO), Sums.over(lacks, sae, ZERO)
    found = score(positive, negative, sae, "ablate", torch.zeros(3))
    assert found.project_L.tolist() == pytest.approx([2.0, 2.0, 0.5 * (2 * 1) + 0.5 * (4 * 0.5)])
    # Encoder rows equal the decoder's, not of unit length: φ = 8 on latent 1, whose g · d is −1.
    assert found.operation_L.tolist() == pytest.approx([2.0, 8.0, 2 * 1 + 4 * 0.5])
    assert found.delta_activation_L.tolist() == pytest.approx([1.0 - 1.0, 4.0 - 2.0, 3.0 - 2.0])
    assert found.difference_in_means_D.tolist() == pytest.approx([0.0, 1.0])


def test_a_latent_that_holds_the_positives_up_scores_positive() -> None:
    """Removing h's component lowers the positive's likelihood (loss gradient against it): the latent causes the behaviour."""
    sae = tiny_sae(torch.tensor([[1.0, 0.0]]))
    shows = [Trace(torch.tensor([[3.0, 0.0]]), torch.tensor([[-0.2, 0.0]]), 1.0)]
    lacks = [Trace(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.1, 0.0]]), 1.0)]
    found = score(Sums.over(shows, sae, ZERO), Sums.over(lacks, sae, ZERO), sae, "ablate", torch.zeros(1))
    assert float(found.operation_L) == pytest.approx(0.9)
    assert float(found.project_L) == pytest.approx(0.9)


def test_the_quadratic_form_is_the_naive_sum() -> None:
    generator = torch.Generator().manual_seed(3)
    sae = tiny_sae(torch.randn(40, 16, generator=generator) * 3)
    mean = torch.randn(16, generator=generator)
    shows, lacks = random_traces(4, 16, 1), random_traces(3, 16, 2)
    found = score(Sums.over(shows, sae, mean), Sums.over(lacks, sae, mean), sae, "project", torch.zeros(40))
    naive = naive_project(shows, sae, mean) - naive_project(lacks, sae, mean)
    torch.testing.assert_close(found.project_L, naive, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("operation", "amount"), [("ablate", 0.0), ("add", 2.5), ("clamp", -3.0), ("scale", -2.0)])
def test_the_score_is_the_first_order_effect_of_the_very_edit(operation: Operation, amount: float) -> None:
    """Σ_t g_t · Δ(h_t) with Δ from the formula that the server runs."""
    sae = tiny_sae(torch.randn(12, 8, generator=torch.Generator().manual_seed(4)), theta=0.7)
    shows, lacks = random_traces(3, 8, 5), random_traces(3, 8, 6)
    amounts = torch.full((12,), amount)
    mean = torch.zeros(8)
    found = score(Sums.over(shows, sae, mean), Sums.over(lacks, sae, mean), sae, operation, amounts)
    alpha, beta = row_coefficients(operation, amounts)
    for latent in range(12):
        rows = sae.rows([latent], alpha[[latent]], beta[[latent]])

        def effect(traces: list[Trace], rows: Rows = rows) -> float:
            return sum(float((t.g_ND * delta(t.a_ND, rows)).sum()) for t in traces) / len(traces)

        assert float(found.operation_L[latent]) == pytest.approx(effect(shows) - effect(lacks), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("operation", ["ablate", "project", "clamp"])
def test_the_mean_over_pairs_is_the_score(operation: Operation) -> None:
    sae = tiny_sae(torch.randn(12, 8, generator=torch.Generator().manual_seed(4)))
    shows, lacks = random_traces(3, 8, 5), random_traces(3, 8, 6)
    mean, amounts, latents = torch.randn(8), torch.full((12,), 0.5), torch.tensor([3, 1])
    found = score(Sums.over(shows, sae, mean), Sums.over(lacks, sae, mean), sae, operation, amounts)
    each = pair_scores(shows, lacks, sae, latents, operation, amounts, mean)
    torch.testing.assert_close(each.operation_PC.mean(0).double(), found.operation_L[latents], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each.project_PC.mean(0).double(), found.project_L[latents], rtol=1e-4, atol=1e-5)


def test_pairs_of_one_prompt_are_one_cluster() -> None:
    values = torch.tensor([[1.0], [3.0], [1.0], [3.0]])
    independent = clustered_se(values, ["a", "b", "c", "d"])
    assert float(independent) == pytest.approx(math.sqrt(4 * 4 / 3) / 4)
    assert float(clustered_se(values, ["a", "b", "a", "b"])) == pytest.approx(math.sqrt(8 * 2) / 4)
    assert float(clustered_se(values, ["a", "a", "b", "b"])) == 0.0
