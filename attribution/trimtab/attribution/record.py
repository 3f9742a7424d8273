"""What a run writes down at one hook point: the bundle, with every choice that changes the ranking in its provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trimtab.attribution.authored import Authored
from trimtab.attribution.bundle import Bundle, Header, LatentRecord, ModelIdentity, SAEIdentity, VectorRecord, now
from trimtab.attribution.edit import project_rows
from trimtab.attribution.interventions import Measured
from trimtab.attribution.ranking import Ranking
from trimtab.attribution.sae import SAE
from trimtab.attribution.stats import Stats
from trimtab.attribution.uncertainty import RESAMPLES
from trimtab.attribution.validation import MAX_DAMAGE, Effects

__all__ = ["bundle_of", "latent_records", "layer_summary", "ranking_summary", "rival_of", "rows_of"]

Promoted = Callable[[Tensor], tuple[str, ...]]
"""Tells the tokens that a direction raises, where the SAE names none."""


def latent_records(ranking: Ranking, effects: Effects, promoted: Promoted) -> tuple[LatentRecord, ...]:
    """The evidence on the leading latents."""
    return tuple(
        _scored(ranking, latent, promoted).model_copy(
            update={
                "effect": effects.each[latent].mean,
                "effect_se": effects.each[latent].se,
                "strength_range": effects.safe,
            }
        )
        for latent in ranking.best
    )


def _scored(ranking: Ranking, latent: int, promoted: Promoted) -> LatentRecord:
    """What is known of a latent before it is intervened on."""
    scores, sae, sure = ranking.scores, ranking.sae, ranking.uncertainty_of(latent)
    return LatentRecord(
        latent=sae.name(latent),
        attribution=float(scores.operation_L[latent]),
        attribution_se=sure.get("se"),
        attribution_interval=(sure["low"], sure["high"]) if sure else None,
        attribution_p=sure.get("p_family"),
        attribution_project=float(scores.project_L[latent]),
        projection=float(scores.projection_L[latent]),
        delta_activation=float(scores.delta_activation_L[latent]),
        max_activation=float(ranking.stats.max_activation_L[latent]),
        density=float(ranking.stats.density_L[latent]),
        top_tokens=sae.top_tokens.get(sae.name(latent)) or promoted(sae.d_LD[latent]),
    )


def ranking_summary(ranking: Ranking, edit: Authored) -> dict[str, Any]:
    """How the ranking came about, for the provenance."""
    scores = ranking.scores
    return {
        "loss": "mean cross-entropy per completion token, nats; completions averaged; positive minus negative",
        "scope": edit.scope,
        "scored_operation": {"operation": edit.operation, "amount": edit.amount, "unit": edit.unit},
        "scored_tokens": ranking.n_tokens,
        "scored_latents": ranking.sae.n_all,
        "encoded_latents": ranking.sae.d_sae,
        "live_latents": int(ranking.live_L.sum()),
        "uncertainty": f"{RESAMPLES} resamples over prompts, of {len(ranking.leading_C)} leading latents",
        "leaders": {
            method: [ranking.sae.name(i) for i in score_L.where(ranking.live_L, -float("inf")).topk(n).indices.tolist()]
            for method, score_L in scores.by.items()
            if (n := min(len(ranking.best), len(score_L)))
        },
    }


def layer_summary(ranking: Ranking, measured: Measured) -> dict[str, Any]:
    """What one hook point carries, to be held against the others: measured effects in nats per token."""
    effects = measured.effects
    return {
        "layer": ranking.sae.layer,
        "sae": ranking.sae.id,
        "attribution_of_the_leaders": round(float(ranking.scores.operation_L[ranking.best].sum()), 4),
        "together": round(effects.together[1.0].mean, 4),
        "together_se": round(effects.together[1.0].se, 4),
        "damage": round(effects.together[1.0].negative, 4),
        "difference_in_means": round(effects.difference_in_means.mean, 4),
        "fidelity": round(measured.fidelity.pearson, 4)
        if measured.fidelity.pearson == measured.fidelity.pearson
        else None,
    }


def bundle_of(
    ranking: Ranking,
    edit: Authored,
    measured: Measured,
    promoted: Promoted,
    *,
    name: str,
    behaviour: str,
    model: ModelIdentity,
    n_train: int,
    layers: Sequence[dict[str, Any]],
    provenance: dict[str, Any],
) -> Bundle:
    """The bundle of one hook point."""
    sae, stats, best = ranking.sae, ranking.stats, ranking.best
    difference_D = ranking.scores.difference_in_means_D
    header = Header(
        name=name,
        behaviour=behaviour,
        created=now(),
        model=model,
        sae=SAEIdentity(id=sae.id, digest=sae.digest, d_sae=sae.n_all),
        layer=sae.layer,
        resid_norm=stats.resid_norm,
        latents=latent_records(ranking, measured.effects, promoted),
        vectors=(
            VectorRecord(
                name="difference_in_means",
                source=f"mean residual on positive minus negative completions of {n_train} train pairs",
                norm=float(difference_D.norm()),
            ),
        ),
        edits=tuple(edit.recommended(sae.name(latent)) for latent in best),
        provenance={
            **provenance,
            **ranking_summary(ranking, edit),
            "stats": stats.source,
            "sae": list(sae.notes),
            "max_damage": MAX_DAMAGE,
            "effects": measured.effects.summary(),
            "fidelity": measured.fidelity.summary(),
            "layers": list(layers),
        },
    )
    return rows_of(header, sae, stats, best, difference_D)


def rival_of(bundle: Bundle, ranking: Ranking, edit: Authored, latents: Sequence[int], promoted: Promoted) -> Bundle:
    """The rival of a run's bundle: the leaders by Δ-activation under the same edit, for a trial to hold the bundle against."""
    header, sae = bundle.header, ranking.sae
    kept = ("command", "pairs", "train_pairs", "scope", "loss", "masked", "scored_operation", "stats", "sae")
    rival = header.model_copy(
        update={
            "name": f"{header.name[:50]}.by-activation",
            "latents": tuple(_scored(ranking, latent, promoted) for latent in latents),
            "vectors": (),
            "edits": tuple(edit.recommended(sae.name(latent)) for latent in latents),
            "provenance": {
                **{name: header.provenance[name] for name in kept if name in header.provenance},
                "chosen_by": f"mean activation on the pairs of {header.name!r}, positives against negatives",
                "rival_of": bundle.content_hash,
            },
        }
    )
    return rows_of(rival, sae, ranking.stats, list(latents))


def rows_of(
    header: Header, sae: SAE, stats: Stats, latents: list[int], difference_in_means_D: Tensor | None = None
) -> Bundle:
    """A bundle of the rows of `latents`, and of the dense vector where there is one."""
    d_KD = sae.d_LD[latents]
    return Bundle(
        header,
        decoder=d_KD.cpu().numpy(),
        encoder=sae.e_LD[latents].cpu().numpy(),
        bias=sae.b_L[latents].cpu().numpy(),
        threshold=sae.theta_L[latents].cpu().numpy(),
        baseline=(project_rows(d_KD)[0] @ stats.mean_D.to(d_KD.device)).cpu().numpy(),
        vectors=None if difference_in_means_D is None else difference_in_means_D[None].cpu().numpy(),
    )
