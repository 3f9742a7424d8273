"""The comparison of predicted with measured effects, on points that can be worked out."""

from __future__ import annotations

import json
import math

import pytest

from trimtab.attribution.fidelity import Fidelity, Point


def of(*points: tuple[float, float]) -> Fidelity:
    return Fidelity.of([Point(i, True, predicted, measured) for i, (predicted, measured) in enumerate(points)])


def test_a_line_is_perfect_whatever_its_slope() -> None:
    found = of((1.0, 0.5), (2.0, 1.0), (-4.0, -2.0))
    assert (found.pearson, found.spearman, found.sign_agreement, found.slope) == pytest.approx((1.0, 1.0, 1.0, 0.5))
    assert found.holds


def test_by_hand() -> None:
    """Centred: (−1.5, −.5, .5, 1.5) and (−1, −2, 1, 2): 6.5 / (√5 √10); ranks 2 1 3 4: 1 − 6·2/60; Σxy/Σxx = 29/30 + …"""
    found = of((1.0, 2.0), (2.0, 1.0), (3.0, 4.0), (4.0, 5.0))
    assert found.pearson == pytest.approx((1.5 * 1 + 0.5 * 2 + 0.5 * 1 + 1.5 * 2) / math.sqrt(5 * 10))
    assert found.spearman == pytest.approx(0.8)
    assert found.slope == pytest.approx((2 + 2 + 12 + 20) / 30)


def test_ties_share_their_rank() -> None:
    """Ranks 1.5 1.5 3 and 1 2 3: Pearson of them is √3/2."""
    assert of((0.0, 1.0), (0.0, 2.0), (1.0, 3.0)).spearman == pytest.approx(math.sqrt(3) / 2)


@pytest.mark.parametrize("points", [((1.0, -1.0), (2.0, -2.0)), ((0.0, 1.0), (0.0, 2.0)), ((1.0, 0.0), (2.0, 0.0))])
def test_the_opposite_and_nothing_at_all_do_not_hold(points: tuple[tuple[float, float], ...]) -> None:
    found = of(*points)
    assert not found.holds
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["holds"] is False
    assert len(summary["points"]) == 2
