"""The edit that a run scores, validates and recommends: one operation with its amount, on whichever latents lead.

Scoring, validation and serving all take their rows from here, so that the bundle recommends exactly what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.attribution.bundle import RecommendedEdit
from trimtab.attribution.edit import Operation, Rows, project_rows
from trimtab.attribution.errors import SettingsError
from trimtab.attribution.gradients import Scope
from trimtab.attribution.sae import SAE
from trimtab.attribution.scores import row_coefficients
from trimtab.attribution.stats import Stats

__all__ = ["DEFAULT_AMOUNT", "Authored", "vector_rows"]

DEFAULT_AMOUNT = 0.1
"""Of `add` and `clamp`, in units of a latent's largest activation: ten latents then move ‖h‖ by a fifth at most."""


@dataclass(frozen=True)
class Authored:
    """An edit at strength 1, on a latent to be named."""

    operation: Operation
    amount: float | None
    unit: Literal["raw", "max_act"]
    scope: Scope
    exclude_special: bool = False
    """Whether it leaves the tokenizer's special tokens alone."""

    @classmethod
    def of(
        cls,
        operation: Operation,
        amount: float | None,
        unit: Literal["raw", "max_act"],
        scope: Scope,
        exclude_special: bool = False,
    ) -> Authored:
        """The edit with its default amount where it has one.

        Raises:
            SettingsError: the operation needs an amount, or takes none.
        """
        if amount is None and operation in ("add", "clamp"):
            amount, unit = DEFAULT_AMOUNT, "max_act"
        if amount is None and operation == "scale":
            raise SettingsError("operation scale needs a factor; give --amount, 0 to remove or 3 to treble")
        if amount is not None and operation in ("ablate", "project"):
            raise SettingsError(f"operation {operation} takes no amount; leave --amount out, or use scale or clamp")
        if unit != "raw" and operation not in ("add", "clamp"):
            raise SettingsError(f"operation {operation} has no unit; leave --unit out")
        return cls(operation, amount, unit, scope, exclude_special)

    def recommended(self, latent: int) -> RecommendedEdit:
        """The edit as a bundle records it."""
        return RecommendedEdit(
            latent=latent,
            operation=self.operation,
            amount=self.amount,
            unit=self.unit,
            scope=self.scope,
            exclude_special=self.exclude_special,
        )

    def amounts(self, stats: Stats) -> Tensor:
        """The amount [L] for each latent, SAE units."""
        amount_L = torch.full_like(stats.max_activation_L, self.amount or 0.0)
        return amount_L * stats.max_activation_L if self.unit == "max_act" else amount_L

    def rows(self, sae: SAE, stats: Stats, latents: list[int], strength: float = 1.0) -> Rows:
        """What the server compiles the recommended edits of `latents` to."""
        if self.operation == "project":
            e_KD, b_K, theta_K, d_KD = project_rows(sae.d_LD[latents])
            return Rows(strength * (d_KD @ stats.mean_D), torch.full_like(b_K, -strength), e_KD, b_K, theta_K, d_KD)
        alpha_K, beta_K = row_coefficients(self.operation, self.amounts(stats)[latents])
        return sae.rows(latents, strength * alpha_K, strength * beta_K)

    @property
    def scored_by_decoder(self) -> bool:
        """Whether the edit leaves its latent's activation unread: then a decoder and a gradient are all that its score needs."""
        return self.operation in ("add", "project")

    @property
    def turns_up(self) -> bool:
        """Whether the edit makes its latents stronger: then it works against the behaviour on latents that oppose it."""
        if self.operation == "scale":
            return (self.amount or 0.0) > 1
        return self.operation in ("add", "clamp") and (self.amount or 0.0) > 0


def vector_rows(v_D: Tensor, amount: float) -> Rows:
    """The one row that adds `amount` of a dense direction."""
    zero = torch.zeros(1)
    return Rows(torch.tensor([amount]), zero, torch.zeros_like(v_D)[None], zero, zero, v_D[None])
