"""Causes that were planted: latents whose effect on the loss is known exactly, among many that fire and do nothing.

Where the loss is linear in the stream, first order is exact, and the planted latents must come first whatever is scored. Where it
saturates, first order is wrong, and the comparison of predicted and measured effects must say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.attribution.tiny import sae_of
from trimtab.attribution.edit import Operation, Rows, delta, project_rows
from trimtab.attribution.fidelity import Fidelity, Point
from trimtab.attribution.gradients import Factors
from trimtab.attribution.moments import Firings, Moments
from trimtab.attribution.sae import SAE
from trimtab.attribution.scores import Method, row_coefficients, score

D, L, N_PAIRS, N_TOKENS = 256, 1024, 10, 6
PLANTED = list(range(100, 108))
"""Fire on both kinds, and hold up the positives."""
BYSTANDERS = list(range(200, 208))
"""Fire three times as strongly on positives, and do nothing."""
Loss = Callable[[Tensor], Tensor]
"""[tokens, D] → nats."""


class World(NamedTuple):
    sae: SAE
    h: Tensor
    """[completions, tokens, D]."""

    def loss(self, saturates: bool) -> Loss:
        """Falls by a known amount for each unit of a planted latent; or by no more than that of its first half unit."""
        d = self.sae.d_LD[:][PLANTED]
        weight = torch.linspace(1.5, 2.0, len(PLANTED))

        def of(h_TD: Tensor) -> Tensor:
            z = h_TD @ d.T
            return -(weight * (z.clamp_max(0.5) if saturates else z)).sum() / len(h_TD)

        return of


def world() -> World:
    generator = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(L, D, generator=generator), dim=1)
    d[PLANTED + BYSTANDERS] = torch.linalg.qr(d[PLANTED + BYSTANDERS].T)[0].T
    sae = sae_of(d, theta=0.9)
    amount = torch.zeros(2 * N_PAIRS, N_TOKENS, L)
    amount[:, :, PLANTED] = 1.5 + torch.rand(2 * N_PAIRS, N_TOKENS, len(PLANTED), generator=generator)
    amount[0::2, :, BYSTANDERS] = 4.5
    amount[1::2, :, BYSTANDERS] = 1.5
    others = torch.rand(amount.shape, generator=generator) < 0.01
    others[:, :, PLANTED + BYSTANDERS] = False
    return World(sae, (amount + 2.0 * others) @ sae.d_LD[:])


def passes(world: World, loss: Loss) -> Factors:
    """Positives have the loss; that of negatives is constant."""
    h = world.h.clone().requires_grad_()
    (g,) = torch.autograd.grad(sum((loss(h_TD) for h_TD in h[0::2]), torch.zeros(())), h)
    return Factors(h.detach().flatten(0, 1), g.flatten(0, 1), torch.arange(2 * N_PAIRS).repeat_interleave(N_TOKENS))


EDITS: list[tuple[Operation, float]] = [
    ("project", 0.0),
    ("ablate", 0.0),
    ("add", -1.0),
    ("clamp", 0.5),
    ("scale", 0.2),
]


def scored(world: World, factors: Factors, operation: Operation, amount: float) -> dict[Method, Tensor]:
    mean, amounts = factors.a_ND.mean(0) * 0, torch.full((L,), amount)
    moments, firings = Moments.over([factors], mean, N_PAIRS), Firings.over([factors], world.sae, N_PAIRS)
    return score(moments, firings, world.sae, operation, amounts, mean).by


def measured(world: World, loss: Loss, operation: Operation, amount: float, latent: int) -> float:
    """The change of the gap under the real edit."""
    if operation == "project":
        e, b, theta, d = project_rows(world.sae.d_LD[[latent]])
        rows = Rows(torch.zeros(1), -torch.ones(1), e, b, theta, d)
    else:
        rows = world.sae.rows([latent], *row_coefficients(operation, torch.tensor([amount])))
    return float(torch.stack([loss(h + delta(h, rows)) - loss(h) for h in world.h[0::2]]).mean())


def fidelity(world: World, saturates: bool, operation: Operation, amount: float) -> Fidelity:
    loss = world.loss(saturates)
    score_L = scored(world, passes(world, loss), operation, amount)[operation]
    latents = [*PLANTED, *BYSTANDERS, *range(300, 310)]
    return Fidelity.of(
        [Point(i, i in PLANTED, float(score_L[i]), measured(world, loss, operation, amount, i)) for i in latents]
    )


@pytest.mark.parametrize(("operation", "amount"), EDITS)
def test_recall_is_1_where_first_order_is_exact(operation: Operation, amount: float) -> None:
    planted = world()
    by = scored(planted, passes(planted, planted.loss(saturates=False)), operation, amount)
    assert sorted(by[operation].topk(len(PLANTED)).indices.tolist()) == PLANTED
    # What fires most on the positives is something else: Δ-activation finds the bystanders.
    assert sorted(by["delta_activation"].topk(len(BYSTANDERS)).indices.tolist()) == BYSTANDERS


@pytest.mark.parametrize(("operation", "amount"), EDITS)
def test_predictions_are_exact_where_first_order_is(operation: Operation, amount: float) -> None:
    found = fidelity(world(), saturates=False, operation=operation, amount=amount)
    assert found.holds
    assert found.pearson == pytest.approx(1.0, abs=1e-4)
    assert found.slope == pytest.approx(1.0, abs=1e-3)


def test_a_saturated_loss_is_flagged() -> None:
    """No gradient is left where the planted latents fire, and yet ablating one costs half a unit of its weight."""
    found = fidelity(world(), saturates=True, operation="ablate", amount=0.0)
    assert max(point.measured for point in found.points) > 0.5
    assert not found.holds
