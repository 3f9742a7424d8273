"""One forward and one backward per completion, through the upper blocks alone.

The loss is each completion's mean cross-entropy in nats per completion token. Since no completion can see another, the gradient
of the batch's summed loss holds every completion's own gradient. Kept are the positions that an edit of the chosen scope touches:
`completion` is n_prompt − 1 … T − 2, the positions that predict the completion's tokens; `all` is 1 … T − 2.

Attention sinks — position 0, and every token whose norm exceeds 6 × the median — are dropped: their norm is two orders above the
others' and one of them would outweigh everything else.

Axes: B completions, T tokens of a padded sequence, N kept tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.attribution.model import pad

if TYPE_CHECKING:
    from trimtab.attribution.model import Prefix, SplitModel
    from trimtab.attribution.pairs import Completion

__all__ = ["SINK_NORM", "Scope", "Trace", "batches", "losses", "positions", "traces"]

Scope = Literal["completion", "all"]
SINK_NORM = 6.0
"""A token is a sink when its norm exceeds this multiple of the median norm."""


class Trace(NamedTuple):
    """One completion at the hook point."""

    a_ND: Tensor
    """Residual activations at the kept positions."""
    g_ND: Tensor
    """Gradient of the completion's mean cross-entropy with respect to them, nats per completion token."""
    loss: float
    """Mean cross-entropy, nats per completion token."""


def positions(completion: Completion, scope: Scope) -> slice:
    """The positions of a completion that an edit of this scope touches and that still predict a token."""
    start = completion.n_prompt - 1 if scope == "completion" else 1
    return slice(max(start, 1), len(completion.ids) - 1)


def batches(completions: Sequence[Completion], batch_size: int) -> Iterator[list[int]]:
    """Indices of `completions`, longest first, so that a batch holds sequences of about one length."""
    order = sorted(range(len(completions)), key=lambda i: (-len(completions[i].ids), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def losses(model: SplitModel, h_BTD: Tensor, completions: Sequence[Completion], prefix: Prefix | None = None) -> Tensor:
    """Mean cross-entropy [B] of each completion, nats per completion token, with h at the hook point (after the `prefix`)."""
    y_BTD = model.upper(h_BTD, prefix)
    start = 0 if prefix is None else prefix.n_tokens
    rows = [y_BTD[i, c.n_prompt - 1 - start : len(c.ids) - 1 - start] for i, c in enumerate(completions)]
    targets = [torch.tensor(c.ids[c.n_prompt :]) for c in completions]
    nats_N = torch.nn.functional.cross_entropy(model.logits(torch.cat(rows)), torch.cat(targets), reduction="none")
    return torch.stack([part.mean() for part in torch.split(nats_N, [len(t) for t in targets])])


def traces(
    model: SplitModel,
    completions: Sequence[Completion],
    *,
    scope: Scope,
    resid_norm: float,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Trace]:
    """The trace of every completion, in their order; `resid_norm` is the median ‖h‖ that tells the sinks."""
    out: dict[int, Trace] = {}
    for batch in batches(completions, batch_size):
        chosen = [completions[i] for i in batch]
        h_BTD = model.lower(pad(chosen)).requires_grad_()
        loss_B = losses(model, h_BTD, chosen)
        (g_BTD,) = torch.autograd.grad(loss_B.sum(), h_BTD)
        for row, (i, completion) in enumerate(zip(batch, chosen, strict=True)):
            window = positions(completion, scope)
            a_ND, g_ND = h_BTD[row, window].detach(), g_BTD[row, window]
            keep_N = a_ND.norm(dim=-1) <= SINK_NORM * resid_norm
            out[i] = Trace(a_ND[keep_N].clone(), g_ND[keep_N].clone(), float(loss_B[row].detach()))
        advance(len(batch))
    return [out[i] for i in range(len(completions))]
