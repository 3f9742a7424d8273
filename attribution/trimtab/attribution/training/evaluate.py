"""What the shipped folder measures, on documents that training never saw.

    FVU                  Σ‖h − ĥ‖² / Σ‖h − mean(h)‖² over tokens (fraction of variance unexplained)
    L0                   mean number of active latents per token
    recovered            (CE_mean − CE_sae) / (CE_mean − CE_clean): cross-entropy of the whole model with the stream at the hook
                         point replaced at every non-sink token by its mean, by the reconstruction, or left alone
    agreement            of JumpReLU's active entries with those of BatchTopK at the training k: |both| / |either|

Everything is read back from the folder, fp16 rounding included. Sinks (position 0, norm above 6 × median) are left out, and
left alone in the splice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trimtab.attribution.training.cache import SINK_RATIO
from trimtab.attribution.training.corpus import Document
from trimtab.attribution.training.dictionary import batch_top_k
from trimtab.attribution.training.jumprelu import JumpReLU

__all__ = ["Reconstruction", "Recovery", "reconstruction", "recovery"]

_BATCH = 2048


@dataclass(frozen=True)
class Reconstruction:
    """Measured on cached activations."""

    n_tokens: int
    fvu: float
    l0: float
    fvu_batch_top_k: float
    l0_batch_top_k: float
    agreement: float
    never_fires: float
    """Fraction of latents that fire on none of these tokens."""

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def reconstruction(sae: JumpReLU, h_TD: torch.Tensor, k: int, advance: Callable[[int], None]) -> Reconstruction:
    """Reconstruction figures over `h_TD` [T, D] fp16, as JumpReLU and as BatchTopK in batches of 2048."""
    mean = h_TD.float().mean(0)
    total = error = error_k = n_active = n_active_k = n_both = 0.0
    fires = torch.zeros(sae.W_enc.shape[1], dtype=torch.bool)
    near = float(sae.threshold.mean())
    for part in torch.split(h_TD, _BATCH):
        h = part.float()
        z_TL = sae.preactivations(h)
        _, lowest = batch_top_k(z_TL, k, near)
        top_TL = z_TL >= lowest
        active_TL = z_TL > sae.threshold
        total += float((h - mean).square().sum())
        error += float((sae.decode(z_TL * active_TL) - h).square().sum())
        error_k += float((sae.decode(z_TL * top_TL) - h).square().sum())
        n_active += float(active_TL.sum())
        n_active_k += float(top_TL.sum())
        n_both += float((active_TL & top_TL).sum())
        fires |= active_TL.any(0)
        advance(len(part))
    n = len(h_TD)
    return Reconstruction(
        n_tokens=n,
        fvu=error / total,
        l0=n_active / n,
        fvu_batch_top_k=error_k / total,
        l0_batch_top_k=n_active_k / n,
        agreement=n_both / (n_active + n_active_k - n_both),
        never_fires=1 - float(fires.float().mean()),
    )


@dataclass(frozen=True)
class Recovery:
    """Mean cross-entropy per token (nats) of the whole model, clean and spliced."""

    n_tokens: int
    clean: float
    sae: float
    mean_ablated: float
    recovered: float
    n_sinks: int
    """Tokens past position 0 left alone for their norm."""

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def recovery(
    sae: JumpReLU,
    model: Any,
    layer: int,
    documents: Sequence[Document],
    mean: torch.Tensor,
    median_norm: float,
    advance: Callable[[int], None],
) -> Recovery:
    """Cross-entropy with the reconstruction (and with `mean` [D]) spliced in after block `layer` of a causal LM."""
    losses = {"clean": 0.0, "sae": 0.0, "mean_ablated": 0.0}
    n_tokens = n_sinks = 0
    current = "clean"

    def splice(_module: object, _inputs: object, output: Any) -> Any:
        nonlocal n_sinks
        h = output[0] if isinstance(output, tuple) else output
        h_TD = h[0]
        usual_T = h_TD.norm(dim=1) <= SINK_RATIO * median_norm
        usual_T[0] = False
        if current == "clean":
            n_sinks += int((~usual_T).sum()) - 1
            return None
        put_TD = sae.decode(sae.encode(h_TD)) if current == "sae" else mean.expand_as(h_TD)
        new = torch.where(usual_T[:, None], put_TD, h_TD)[None]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.model.layers[layer].register_forward_hook(splice)
    try:
        for document in documents:
            ids = torch.tensor([document.tokens])
            target = ids[0, document.skip :]
            for current in losses:
                logits = model(input_ids=ids, use_cache=False).logits[0, document.skip - 1 : -1]
                losses[current] += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
            n_tokens += len(target)
            advance(1)
    finally:
        handle.remove()
    clean, spliced, ablated = (total / n_tokens for total in losses.values())
    return Recovery(n_tokens, clean, spliced, ablated, (ablated - spliced) / (ablated - clean), n_sinks)
