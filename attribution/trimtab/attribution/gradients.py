"""One forward and one backward per completion, through the upper blocks alone.

The loss is each completion's mean cross-entropy in nats per completion token. Since no completion can see another, the gradient
of the batch's summed loss holds every completion's own gradient; the weights get none. Kept are the positions that an edit of the
scope touches: `completion` is n_prompt − 1 … T − 2, the positions that predict the completion's tokens; `all` is 1 … T − 2.

Attention sinks — position 0, and every token whose norm exceeds 6 × the median — are dropped: their norm is two orders above the
others' and one of them would outweigh everything else. So are the positions of special tokens where the edit leaves them alone.

Which gradient: `plain`; `relp`, by the rules of `linearise`; or `integrated`, the mean of the gradients on the straight path from
h to its mean ā at the kept positions, all of them together (midpoints of `STEPS` equal parts).

Axes: B completions, T tokens of a padded sequence, N kept tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.attribution.errors import GradientError
from trimtab.attribution.linearise import relp
from trimtab.attribution.model import pad

if TYPE_CHECKING:
    from trimtab.attribution.model import Prefix, SplitModel
    from trimtab.attribution.pairs import Completion

__all__ = [
    "BATCH_TOKENS",
    "SINK_NORM",
    "STEPS",
    "Factors",
    "Gradient",
    "Pass",
    "Scope",
    "Tracing",
    "batches",
    "losses",
    "positions",
    "trace",
]

Scope = Literal["completion", "all"]
Gradient = Literal["plain", "relp", "integrated"]
SINK_NORM = 6.0
"""A token is a sink when its norm exceeds this multiple of the median norm."""
BATCH_TOKENS = 1024
"""Tokens of a batch: what bounds the memory of a pass, whose largest part is the logits' [tokens, vocabulary]."""
STEPS = 8
"""Gradients on the path of `integrated`."""


class Factors(NamedTuple):
    """What one pass leaves of some completions at one hook point: a row per kept token."""

    a_ND: Tensor
    """Residual activation."""
    g_ND: Tensor
    """Gradient of the completion's mean cross-entropy with respect to it, nats per completion token."""
    of_N: Tensor
    """Which completion the token belongs to; an even number is the positive of a pair, the odd one after it its negative."""


class Pass(NamedTuple):
    """A batch of completions after its forward and backward."""

    factors: dict[int, Factors]
    """By layer."""
    loss: dict[int, float]
    """Mean cross-entropy of each completion, nats per completion token."""


@dataclass(frozen=True)
class Tracing:
    """Which gradient is taken, and at which tokens it is kept."""

    scope: Scope
    resid_norm: dict[int, float]
    """Median ‖h‖ at the hook point of each layer, which tells the sinks."""
    gradient: Gradient = "plain"
    mean_D: Tensor | None = None
    """ā, where the path of `integrated` ends."""
    left_alone: frozenset[int] = frozenset()
    """Token ids whose positions the edit leaves alone."""


def positions(completion: Completion, scope: Scope) -> slice:
    """The positions of a completion that an edit of this scope touches and that still predict a token."""
    start = completion.n_prompt - 1 if scope == "completion" else 1
    return slice(max(start, 1), len(completion.ids) - 1)


def batches(completions: Sequence[Completion], n_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of `completions`, longest first, so that a batch holds sequences of about one length: at most `n_tokens`, padding
    included, or one sequence that is longer."""
    order = sorted(range(len(completions)), key=lambda i: (-len(completions[i].ids), i))
    while order:
        n = max(1, n_tokens // len(completions[order[0]].ids))
        yield order[:n]
        order = order[n:]


def losses(model: SplitModel, h_BTD: Tensor, completions: Sequence[Completion], prefix: Prefix | None = None) -> Tensor:
    """Mean cross-entropy [B] of each completion, nats per completion token, with h at the hook point (after the `prefix`)."""
    y_BTD = model.upper(h_BTD, prefix)
    start = 0 if prefix is None else prefix.n_tokens
    rows = [y_BTD[i, c.n_prompt - 1 - start : len(c.ids) - 1 - start] for i, c in enumerate(completions)]
    targets = [torch.tensor(c.ids[c.n_prompt :], device=h_BTD.device) for c in completions]
    nats_N = torch.nn.functional.cross_entropy(model.logits(torch.cat(rows)), torch.cat(targets), reduction="none")
    return torch.stack([part.mean() for part in torch.split(nats_N, [len(t) for t in targets])])


def trace(model: SplitModel, completions: Sequence[Completion], batch: Sequence[int], tracing: Tracing) -> Pass:
    """The factors of `completions[i]` for each i of `batch`, at the hook point of the model and at those above it.

    Raises:
        GradientError: a loss or a gradient is not finite.
    """
    chosen = [completions[i] for i in batch]
    h_BTD = model.lower(pad(chosen))
    kept_BT = _kept(h_BTD, chosen, tracing, model.layer)
    with relp(model) if tracing.gradient == "relp" else nullcontext():
        if tracing.gradient == "integrated":
            loss_B, streams = _integrated(model, h_BTD, kept_BT, chosen, tracing)
        else:
            loss_B, streams = _gradients(model, h_BTD, chosen)
    of_BT = torch.tensor(batch, device=h_BTD.device)[:, None].expand_as(kept_BT)
    factors = {}
    for layer, (a_BTD, g_BTD) in streams.items():
        kept_BT = _kept(a_BTD, chosen, tracing, layer)
        factors[layer] = Factors(a_BTD[kept_BT], g_BTD[kept_BT], of_BT[kept_BT])
    for row, i in enumerate(batch):
        found = [f.g_ND[f.of_N == i] for f in factors.values()]
        if not all(bool(torch.isfinite(g).all()) for g in (loss_B[row], *found)):
            raise GradientError(i)
    return Pass(factors, dict(zip(batch, loss_B.tolist(), strict=True)))


Streams = dict[int, tuple[Tensor, Tensor]]
"""(h, gradient) [B, T, D] by layer."""


def _gradients(model: SplitModel, h_BTD: Tensor, chosen: list[Completion]) -> tuple[Tensor, Streams]:
    h_BTD = h_BTD.detach().requires_grad_()
    loss_B = losses(model, h_BTD, chosen)
    streams = {model.layer: h_BTD, **model.above_streams()}
    g = torch.autograd.grad(loss_B.sum(), list(streams.values()))
    return loss_B.detach(), {i: (h.detach(), g_BTD) for (i, h), g_BTD in zip(streams.items(), g, strict=True)}


def _integrated(
    model: SplitModel, h_BTD: Tensor, kept_BT: Tensor, chosen: list[Completion], tracing: Tracing
) -> tuple[Tensor, Streams]:
    assert tracing.mean_D is not None  # `run` sets it with this gradient.
    to_mean_BTD = torch.where(kept_BT[..., None], tracing.mean_D.to(h_BTD) - h_BTD, 0.0)
    with torch.no_grad():
        loss_B = losses(model, h_BTD, chosen)
        model.above_streams()
    mean_g_BTD = torch.zeros_like(h_BTD)
    for step in range(STEPS):
        _, streams = _gradients(model, h_BTD + (step + 0.5) / STEPS * to_mean_BTD, chosen)
        mean_g_BTD += streams[model.layer][1] / STEPS
    return loss_B, {model.layer: (h_BTD, mean_g_BTD)}


def _kept(h_BTD: Tensor, chosen: list[Completion], tracing: Tracing, layer: int) -> Tensor:
    """Which positions [B, T] are kept."""
    kept_BT = torch.zeros(h_BTD.shape[:2], dtype=torch.bool)
    for row, completion in enumerate(chosen):
        window = positions(completion, tracing.scope)
        ids = completion.ids[window]
        kept_BT[row, window] = torch.tensor([i not in tracing.left_alone for i in ids], dtype=torch.bool)
    norm_BT: Tensor = torch.linalg.vector_norm(h_BTD.float(), dim=-1)
    return kept_BT.to(h_BTD.device) & (norm_BT <= SINK_NORM * tracing.resid_norm[layer])
