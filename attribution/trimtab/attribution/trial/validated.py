"""The bundle that a trial leaves: measured effects and safe strengths per latent, and the chosen edits recommended."""

from __future__ import annotations

from typing import Any

from trimtab.attribution.bundle import Bundle
from trimtab.attribution.trial.doses import Estimate
from trimtab.attribution.trial.run import Result

__all__ = ["validated"]


def validated(result: Result, provenance: dict[str, Any]) -> Bundle:
    """The bundle of the trial with its evidence; the edits stay where nothing was chosen."""
    bundle = result.trial.bundle
    header = bundle.header
    records = []
    for record in header.latents:
        arm = f"latent {record.latent}"
        update: dict[str, Any] = {"strength_range": result.range_of(arm)}
        if arm in result.margins:
            margin = Estimate.of(result.margins[arm].margin_P)
            update |= {"effect": margin.mean, "effect_se": margin.se if margin.se < float("inf") else None}
        records.append(record.model_copy(update=update))
    chosen = result.choice.latents if result.choice is not None else ()
    edits = header.edits
    if chosen:
        like = next(edit for edit in edits if edit.latent is not None)
        own = {edit.latent: edit for edit in edits if edit.latent is not None}
        edits = tuple(own.get(latent) or like.model_copy(update={"latent": latent}) for latent in chosen)
    return Bundle(
        header.model_copy(
            update={
                "latents": tuple(records),
                "edits": edits,
                "provenance": {**header.provenance, "trial": provenance},
            }
        ),
        decoder=bundle.decoder,
        encoder=bundle.encoder,
        bias=bundle.bias,
        threshold=bundle.threshold,
        baseline=bundle.baseline,
        vectors=bundle.vectors,
    )
