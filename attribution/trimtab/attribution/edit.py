"""The one formula: what an edit does to the residual stream, for attribution and for serving alike.

    h' = h + Σ_i [ α_i + β_i · φ_i(e_i · h + b_i) ] d_i        φ_i(x) = x if x > θ_i else 0

Every operation is a row (α, β, e, b, θ, d) of it. One threshold covers each activation function: θ = 0 is ReLU,
θ > 0 is JumpReLU (Rajamanoharan et al. 2024), θ = −inf is the identity. All activations are read from the *unedited* h and the
sum is taken in fp32 whatever the dtype of h, so the order of edits never matters.

Axes: T tokens, D d_model, K rows.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["OPERATIONS", "Operation", "Rows", "coefficients", "delta", "project_rows"]

Operation = Literal["add", "ablate", "clamp", "scale", "project"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True)
class Rows:
    """K rows of the formula at one hook point, all fp32."""

    alpha_K: Tensor
    """Constant coefficient of each direction, in SAE units."""
    beta_K: Tensor
    """Coefficient of the latent's own activation."""
    e_KD: Tensor
    """Encoder rows, the SAE's input normalisation folded in."""
    b_K: Tensor
    """Encoder biases, likewise folded."""
    theta_K: Tensor
    """Thresholds of φ; −inf makes φ the identity."""
    d_KD: Tensor
    """Decoder directions."""

    @staticmethod
    def concat(parts: "list[Rows]") -> "Rows":
        """All rows of `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        return Rows(*(torch.cat([getattr(p, f) for p in parts]) for f in Rows.__dataclass_fields__))


def coefficients(operation: Operation, *, amount: float, strength: float, baseline: float = 0.0) -> tuple[float, float]:
    """(α, β) of an operation at a strength.

    `amount` is what `add` adds, what `clamp` clamps to (SAE units), or the factor of `scale`; `ablate` and `project` take none.
    `baseline` is the mean activation's projection ā·u, used by `project` alone. `strength` multiplies the whole row.
    """
    match operation:
        case "add":
            alpha, beta = amount, 0.0
        case "ablate":
            alpha, beta = 0.0, -1.0
        case "clamp":
            alpha, beta = amount, -1.0
        case "scale":
            alpha, beta = 0.0, amount - 1.0
        case "project":
            alpha, beta = baseline, -1.0
    return strength * alpha + 0.0, strength * beta + 0.0  # + 0.0 turns -0.0 into 0.0: one spelling, one plan hash


def project_rows(d_KD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(e, b, θ, d) of a projection: both reader and writer are the unit direction u, and φ is the identity."""
    u_KD = d_KD / d_KD.norm(dim=-1, keepdim=True)
    zeros_K = torch.zeros(len(d_KD), device=d_KD.device)
    return u_KD, zeros_K, torch.full_like(zeros_K, -math.inf), u_KD


def delta(h_TD: Tensor, rows: Rows) -> Tensor:
    """Δ [T, D] in fp32 such that h' = h + Δ; the reference that every faster implementation is tested against."""
    x_TK = h_TD.float() @ rows.e_KD.T + rows.b_K
    phi_TK = torch.where(x_TK > rows.theta_K, x_TK, 0.0)
    return (rows.alpha_K + rows.beta_K * phi_TK) @ rows.d_KD
