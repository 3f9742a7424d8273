"""Does the first-order prediction agree with what the edit really does, on the same completions?

Predicted is Σ_t g_t · Δ(h_t), measured the loss under the edit minus without it; both are means over the held-out pairs of
positive minus negative, for the leading latents and for random ones. A run whose correlation falls below `MIN_PEARSON` fails: its
ranking is of a linear model that the network does not follow at this strength.

Axes: C latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["MIN_PEARSON", "Fidelity", "Point"]

MIN_PEARSON = 0.5
"""On the embedded model adding and ablating reach 0.9 and more, projecting 0.6 to 0.9."""


class Point(NamedTuple):
    """One latent in the scatter plot; nats per completion token."""

    latent: int
    leading: bool
    """Whether it leads the ranking, or is a random one."""
    predicted: float
    measured: float


@dataclass(frozen=True)
class Fidelity:
    """How predicted and measured effects agree; NaN where there is no spread to speak of."""

    points: tuple[Point, ...]
    pearson: float
    spearman: float
    sign_agreement: float
    """Fraction of latents whose measured effect has the predicted sign."""
    slope: float
    """Least-squares slope of measured on predicted, through 0: below 1 the prediction exaggerates."""

    @classmethod
    def of(cls, points: Sequence[Point]) -> Fidelity:
        """The agreement over the points."""
        predicted_C = torch.tensor([point.predicted for point in points], dtype=torch.float64)
        measured_C = torch.tensor([point.measured for point in points], dtype=torch.float64)
        square = float(predicted_C.square().sum())
        return cls(
            points=tuple(points),
            pearson=_correlation(predicted_C, measured_C),
            spearman=_correlation(_ranks(predicted_C), _ranks(measured_C)),
            sign_agreement=float((predicted_C.sign() == measured_C.sign()).double().mean()),
            slope=float((predicted_C * measured_C).sum()) / square if square else math.nan,
        )

    @property
    def holds(self) -> bool:
        """Whether the ranking may be believed."""
        return self.pearson >= MIN_PEARSON

    def summary(self) -> dict[str, Any]:
        """As a bundle's provenance records it."""
        numbers = {name: value for name, value in asdict(self).items() if name != "points"}
        return {
            **{name: round(value, 4) if math.isfinite(value) else None for name, value in numbers.items()},
            "bar": MIN_PEARSON,
            "holds": self.holds,
            "points": [
                {**point._asdict(), "predicted": round(point.predicted, 6), "measured": round(point.measured, 6)}
                for point in self.points
            ],
        }


def _correlation(x_C: Tensor, y_C: Tensor) -> float:
    x_C, y_C = x_C - x_C.mean(), y_C - y_C.mean()
    scale = float(torch.linalg.vector_norm(x_C) * torch.linalg.vector_norm(y_C))
    return float(x_C @ y_C) / scale if scale else math.nan


def _ranks(x_C: Tensor) -> Tensor:
    """Ranks, equal values sharing the mean of theirs."""
    below_CC, same_CC = x_C[:, None] > x_C, x_C[:, None] == x_C
    return below_CC.sum(1) + (same_CC.sum(1) + 1) / 2
