"""The scores, by hand on two tokens and three latents, and against their definition on random ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.attribution.tiny import factors_of, passes_of, random_factors, sae_of
from tests.bench.attribution import peak
from trimtab.attribution.edit import Operation, Rows, delta
from trimtab.attribution.gradients import Factors
from trimtab.attribution.matrix import Stored
from trimtab.attribution.moments import Firings, Moments
from trimtab.attribution.sae import SAE
from trimtab.attribution.sae_files import safetensors
from trimtab.attribution.scores import Directions, Scores, completion_scores, naive_project, row_coefficients, score

ZERO = torch.zeros(2)


def scores_of(
    factors: Factors, sae: SAE, operation: Operation, amounts: torch.Tensor, mean: torch.Tensor, size: int = 2
) -> Scores:
    n_pairs = (int(factors.of_N.max()) + 1) // 2
    passes = passes_of(factors, size)
    moments, firings = Moments.over(passes, mean, n_pairs), Firings.over(passes, sae, n_pairs)
    return score(moments, firings, sae, operation, amounts, mean)


def test_two_tokens_by_hand() -> None:
    """a = (2, 0), (0, 4); g = (−1, 0), (0, −0.5): loss falls along what is there, so removing it costs 2 and 2."""
    sae = sae_of(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    factors = factors_of(([[2.0, 0.0], [0.0, 4.0]], [[-1.0, 0.0], [0.0, -0.5]]), ([[1.0, 1.0]], [[0.0, 0.0]]))
    found = scores_of(factors, sae, "ablate", torch.zeros(3), ZERO)
    assert found.project_L.tolist() == pytest.approx([2.0, 2.0, 0.5 * (2 * 1) + 0.5 * (4 * 0.5)])
    # Encoder rows equal the decoder's, not of unit length: φ = 8 on latent 1, whose g · d is −1.
    assert found.operation_L.tolist() == pytest.approx([2.0, 8.0, 2 * 1 + 4 * 0.5])
    assert found.by["add"].tolist() == pytest.approx([-1.0, -1.0, -1.5])
    assert found.delta_activation_L.tolist() == pytest.approx([1.0 - 1.0, 4.0 - 2.0, 3.0 - 2.0])
    assert found.difference_in_means_D.tolist() == pytest.approx([0.0, 1.0])
    assert found.projection_L.tolist() == pytest.approx([1.0, 2.0, 3 / 2**0.5])


def test_a_latent_that_holds_the_positives_up_scores_positive() -> None:
    """Removing h's component lowers the positive's likelihood (loss gradient against it): the latent causes the behaviour."""
    factors = factors_of(([[3.0, 0.0]], [[-0.2, 0.0]]), ([[3.0, 0.0]], [[0.1, 0.0]]))
    found = scores_of(factors, sae_of(torch.tensor([[1.0, 0.0]])), "ablate", torch.zeros(1), ZERO)
    assert float(found.operation_L) == pytest.approx(0.9)
    assert float(found.project_L) == pytest.approx(0.9)


def test_the_sign_of_the_projection_tells_a_presence_from_an_absence() -> None:
    """Both positives lose when the first direction is set to its mean, one from above it and one from below."""
    sae, mean = sae_of(torch.tensor([[1.0, 0.0]])), torch.tensor([2.0, 0.0])
    lacks = ([[2.0, 0.0]], [[0.0, 0.0]])
    presence = scores_of(factors_of(([[3.0, 0.0]], [[-0.5, 0.0]]), lacks), sae, "project", torch.zeros(1), mean)
    absence = scores_of(factors_of(([[1.0, 0.0]], [[0.5, 0.0]]), lacks), sae, "project", torch.zeros(1), mean)
    assert float(presence.project_L) == float(absence.project_L) == pytest.approx(0.5)
    assert (float(presence.projection_L), float(absence.projection_L)) == (1.0, -1.0)


def test_the_quadratic_form_is_the_naive_sum() -> None:
    generator = torch.Generator().manual_seed(3)
    sae, mean = sae_of(torch.randn(40, 16, generator=generator) * 3), torch.randn(16, generator=generator)
    factors = random_factors(4, 16, 1)
    found = scores_of(factors, sae, "project", torch.zeros(40), mean)
    naive = naive_project([factors], sae, mean, 4)
    assert float((found.project_L - naive).abs().max() / naive.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("operation", "amount"), [("ablate", 0.0), ("add", 2.5), ("clamp", -3.0), ("scale", -2.0), ("scale", 3.0)]
)
def test_the_score_is_the_first_order_effect_of_the_very_edit(operation: Operation, amount: float) -> None:
    """Σ_t g_t · Δ(h_t) with Δ from the formula that the server runs."""
    sae = sae_of(torch.randn(12, 8, generator=torch.Generator().manual_seed(4)), theta=0.7)
    factors, amounts = random_factors(3, 8, 5), torch.full((12,), amount)
    found = scores_of(factors, sae, operation, amounts, torch.zeros(8))
    alpha, beta = row_coefficients(operation, amounts)
    sign = 1 - 2 * (factors.of_N % 2)
    for latent in range(12):
        rows: Rows = sae.rows([latent], alpha[[latent]], beta[[latent]])
        effect = float((sign * (factors.g_ND * delta(factors.a_ND, rows)).sum(1)).sum()) / 3
        assert float(found.operation_L[latent]) == pytest.approx(effect, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("operation", ["ablate", "project", "clamp", "add"])
def test_the_mean_over_pairs_is_the_score(operation: Operation) -> None:
    sae = sae_of(torch.randn(12, 8, generator=torch.Generator().manual_seed(4)))
    factors = random_factors(3, 8, 5)
    mean, amounts, latents = torch.randn(8), torch.full((12,), 0.5), torch.tensor([3, 1])
    found = scores_of(factors, sae, operation, amounts, mean)
    each = completion_scores(passes_of(factors, 2), sae, latents, operation, amounts, mean, 6)
    torch.testing.assert_close(
        (each[0::2] - each[1::2]).mean(0), found.operation_L[latents], rtol=1e-4, atol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("size", [1, 2, 6])
def test_how_completions_are_batched_changes_no_score(size: int) -> None:
    sae = sae_of(torch.randn(12, 8, generator=torch.Generator().manual_seed(4)), theta=0.5)
    factors, amounts, mean = random_factors(3, 8, 7), torch.full((12,), 0.5), torch.randn(8)
    one, other = (scores_of(factors, sae, "clamp", amounts, mean, n) for n in (size, 4))
    for method, score_L in one.by.items():
        torch.testing.assert_close(score_L, other.by[method], rtol=1e-5, atol=1e-6)


def test_a_decoder_is_scored_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    d = torch.randn(50, 8)
    factors, mean = random_factors(3, 8, 7), torch.randn(8)
    moments = Moments.over([factors], mean, 3)
    whole = Directions.of(moments, d, mean)
    monkeypatch.setattr("trimtab.attribution.scores.ROWS", 7)
    monkeypatch.setattr("trimtab.attribution.scores.TRIANGLE", 3)
    torch.testing.assert_close(Directions.of(moments, d, mean).project_L, whole.project_L)


def test_a_direction_of_no_length_scores_nothing() -> None:
    moments = Moments.over([random_factors(2, 4, 7)], torch.zeros(4), 2)
    assert Directions.of(moments, torch.zeros(1, 4), torch.zeros(4)).project_L.tolist() == [0.0]


def test_a_decoder_on_disk_is_scored_in_a_few_megabytes(tmp_path: Path) -> None:
    """Of 67 MB a block of rows at a time is in memory, and three numbers a latent."""
    file = tmp_path / "decoder.safetensors"
    save_file({"W_dec": torch.randn(1 << 16, 256)}, file)
    mapped = Stored(safetensors(file)["W_dec"])
    moments = Moments.over([random_factors(2, 256, 7)], torch.zeros(256), 2)
    with peak() as used:
        found = Directions.of(moments, mapped, torch.zeros(256))
    assert len(found.project_L) == 1 << 16
    assert used[0] < 16e6
