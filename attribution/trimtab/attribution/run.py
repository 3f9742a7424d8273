"""An attribution run: pairs → traces → scores → selected latents → measured effects → a bundle in memory.

    1 the pairs are read, tokenised and split by prompt          `pairs`
    2 one forward and one backward a train completion            `gradients`
    3 every latent is scored                                     `scores`
    4 the leading live latents are selected                      `selection`
    5 each is intervened on, beside its controls, on held-out pairs   `validation`
    6 rows, evidence and provenance become a bundle              `bundle`

Nothing is written here: a run that fails leaves nothing behind.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from rich.progress import Progress
from torch import Tensor

from trimtab.attribution.bundle import (
    Bundle,
    Header,
    LatentRecord,
    Name,
    RecommendedEdit,
    SAEIdentity,
    VectorRecord,
    now,
)
from trimtab.attribution.edit import Operation, Rows, project_rows
from trimtab.attribution.errors import SettingsError
from trimtab.attribution.gradients import Scope, Trace, traces
from trimtab.attribution.model import SplitModel, identify, load_tokenizer
from trimtab.attribution.pairs import load_pairs, split, tokenise
from trimtab.attribution.sae import SAE
from trimtab.attribution.scores import Scores, Sums, clustered_se, pair_scores, row_coefficients, score
from trimtab.attribution.selection import leading, random_live
from trimtab.attribution.stats import Stats, measure_stats
from trimtab.attribution.validation import Effect, Margins

__all__ = ["Controls", "Result", "Settings", "attribute"]

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Strengths of the recommended edits at which the margin is measured."""
MAX_DAMAGE = 0.5
"""A strength is safe while it raises the cross-entropy of the negative completions by less than this, nats per token."""
N_STANDARD_ERRORS = 200
"""Leading latents that get a standard error."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked for."""

    pairs: Path
    sae: Path
    model: str
    name: str
    behaviour: str
    operation: Operation = "ablate"
    amount: float | None = None
    """`add`: amount; `clamp`: target; `scale`: factor; none for ablate and project."""
    unit: Literal["raw", "max_act"] = "raw"
    scope: Scope = "completion"
    top: int = 10
    """Latents in the bundle; the recommended edits act on all of them."""
    held_out: float = 0.35
    """Fraction of the prompts kept for validation."""
    n_validation: int = 24
    """Held-out pairs that are measured, at most."""
    command: str = ""
    """What a person types to run it again."""


@dataclass(frozen=True)
class Controls:
    """Effects to hold the leading latents against; all on the same held-out pairs."""

    together: dict[float, Effect]
    """The recommended edits together, by strength."""
    random: tuple[Effect, ...]
    """The same operation on as many random live latents, one at a time."""
    random_together: Effect
    delta_activation: Effect
    """The same operation on as many leaders by Δ-activation, together."""
    difference_in_means: Effect
    """The difference in means, subtracted once."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    bundle: Bundle
    effects: dict[int, Effect]
    """Each leading latent under its recommended edit."""
    controls: Controls
    scores: Scores


def attribute(settings: Settings, progress: Progress) -> Result:
    """Run the six stages.

    Raises:
        AttributionError: the pairs, the SAE or the model cannot be used; the message says what to do.
    """
    started = time.monotonic()
    edit = _check(settings)
    file = load_pairs(settings.pairs)
    train, held_out = split(file.pairs, settings.held_out)
    sae = SAE.load(settings.sae)
    identity, _ = identify(settings.model)
    sae.check_model(identity)
    tokenizer = load_tokenizer(settings.model)
    tokens = [tokenise(tokenizer, pair) for pair in train]
    held_out = held_out[: settings.n_validation]
    held_out_tokens = [tokenise(tokenizer, pair) for pair in held_out]
    model = SplitModel.load(settings.model, sae.layer)
    stats = sae.stats or measure_stats(model, sae.encode, [c for pair in held_out_tokens for c in pair])

    task = progress.add_task("gradients", total=2 * len(train))
    found = traces(
        model,
        [c for pair in tokens for c in pair],
        scope=settings.scope,
        resid_norm=stats.resid_norm,
        advance=lambda n: progress.advance(task, n),
    )
    positive, negative = found[0::2], found[1::2]

    amount_L = _amounts(edit, stats)
    sums = Sums.over(positive, sae, stats.mean_D), Sums.over(negative, sae, stats.mean_D)
    scores = score(*sums, sae, settings.operation, amount_L)
    live_L = (stats.density_L > 0) & scores.fires_L
    best = leading(scores.operation_L, live_L, sae.d_LD, settings.top)
    by_activation = leading(scores.delta_activation_L, live_L, sae.d_LD, len(best))
    activity_L = sums[0].phi_L + sums[1].phi_L
    control = random_live(live_L, best, activity_L, max(10, len(best)))

    task = progress.add_task("interventions", total=len(best) + len(control) + len(STRENGTHS) + 3)
    margins = Margins(model, held_out_tokens, [pair.prompt_key for pair in held_out], settings.scope)

    def effect(rows: Rows) -> Effect:
        progress.advance(task)
        return margins.effect(rows)

    def rows_of(latents: list[int], strength: float = 1.0) -> Rows:
        return _rows(sae, stats, edit, amount_L, latents, strength)

    means_D = scores.difference_in_means_D
    effects = {latent: effect(rows_of([latent])) for latent in best}
    controls = Controls(
        together={strength: effect(rows_of(best, strength)) for strength in STRENGTHS},
        random=tuple(effect(rows_of([latent])) for latent in control),
        random_together=effect(rows_of(control[: len(best)])),
        delta_activation=effect(rows_of(by_activation)),
        difference_in_means=effect(_vector_rows(means_D, -1.0)),
    )
    se_L = _standard_errors(
        positive, negative, sae, scores, live_L, settings, amount_L, stats, [p.prompt_key for p in train]
    )
    records = tuple(
        LatentRecord(
            latent=latent,
            attribution=float(scores.operation_L[latent]),
            attribution_se=se_L.get(latent),
            attribution_project=float(scores.project_L[latent]),
            delta_activation=float(scores.delta_activation_L[latent]),
            effect=effects[latent].mean,
            effect_se=effects[latent].se,
            max_activation=float(stats.max_activation_L[latent]),
            density=float(stats.density_L[latent]),
            strength_range=_safe(controls.together),
            top_tokens=sae.top_tokens.get(latent) or _promoted(model, tokenizer, sae.d_LD[latent]),
        )
        for latent in best
    )
    header = Header(
        name=settings.name,
        behaviour=settings.behaviour,
        created=now(),
        model=identity,
        sae=SAEIdentity(id=sae.id, digest=sae.digest, d_sae=sae.d_sae),
        layer=sae.layer,
        resid_norm=stats.resid_norm,
        latents=records,
        vectors=(
            VectorRecord(
                name="difference_in_means",
                source=f"mean residual on positive minus negative completions of {len(train)} train pairs",
                norm=float(means_D.norm()),
            ),
        ),
        edits=tuple(edit.model_copy(update={"latent": latent}) for latent in best),
        provenance={
            "command": settings.command,
            "pairs": {
                "file": settings.pairs.name,
                "digest": file.digest,
                "n": len(file.pairs),
                "prompts": file.n_prompts,
            },
            "train_pairs": len(train),
            "held_out_pairs": len(held_out),
            "loss": "mean cross-entropy per completion token, nats",
            "scope": settings.scope,
            "scored_operation": edit.model_dump(mode="json", include={"operation", "amount", "unit", "scope"}),
            "stats": stats.source,
            "controls": _describe(controls),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    d_KD = sae.d_LD[best]
    bundle = Bundle(
        header,
        decoder=d_KD.numpy(),
        encoder=sae.e_LD[best].numpy(),
        bias=sae.b_L[best].numpy(),
        threshold=sae.theta_L[best].numpy(),
        baseline=(project_rows(d_KD)[0] @ stats.mean_D).numpy(),
        vectors=means_D[None].numpy(),
    )
    return Result(bundle, effects, controls, scores)


def _check(settings: Settings) -> RecommendedEdit:
    """The recommended edit, on a latent to be named; what the bundle would refuse in the end is refused at once."""
    try:
        TypeAdapter(Name).validate_python(settings.name)
    except ValueError as e:
        raise SettingsError(
            f"{settings.name!r} cannot name a bundle; use at most 64 letters, digits, '.', '_' and '-', a letter or digit first"
        ) from e
    try:
        return RecommendedEdit(
            latent=0,
            operation=settings.operation,
            amount=settings.amount,
            unit=settings.unit,
            scope=settings.scope,
        )
    except ValueError as e:
        needs = "takes no amount" if settings.operation in ("ablate", "project") else "needs an amount"
        raise SettingsError(
            f"operation {settings.operation} {needs}; give --amount with add, clamp and scale alone"
        ) from e


def _amounts(edit: RecommendedEdit, stats: Stats) -> Tensor:
    """The edit's amount [L] for each latent, SAE units."""
    amount_L = torch.full_like(stats.density_L, edit.amount or 0.0)
    return amount_L * stats.max_activation_L if edit.unit == "max_act" else amount_L


def _rows(sae: SAE, stats: Stats, edit: RecommendedEdit, amount_L: Tensor, latents: list[int], strength: float) -> Rows:
    """What the server compiles the recommended edits of `latents` to."""
    if edit.operation == "project":
        e_KD, b_K, theta_K, d_KD = project_rows(sae.d_LD[latents])
        return Rows(strength * (d_KD @ stats.mean_D), torch.full_like(b_K, -strength), e_KD, b_K, theta_K, d_KD)
    alpha_K, beta_K = row_coefficients(edit.operation, amount_L[latents])
    return sae.rows(latents, strength * alpha_K, strength * beta_K)


def _vector_rows(v_D: Tensor, amount: float) -> Rows:
    zero = torch.zeros(1)
    return Rows(torch.tensor([amount]), zero, torch.zeros_like(v_D)[None], zero, zero, v_D[None])


def _standard_errors(
    positive: list[Trace],
    negative: list[Trace],
    sae: SAE,
    scores: Scores,
    live_L: Tensor,
    settings: Settings,
    amount_L: Tensor,
    stats: Stats,
    prompts: list[str],
) -> dict[int, float]:
    """Standard errors of the leading latents' operation scores, clustered by prompt."""
    order = torch.where(live_L, scores.operation_L, -torch.inf).argsort(descending=True)
    latents = order[: min(N_STANDARD_ERRORS, int(live_L.sum()))]
    each = pair_scores(positive, negative, sae, latents, settings.operation, amount_L, stats.mean_D)
    return dict(zip(latents.tolist(), clustered_se(each.operation_PC, prompts).tolist(), strict=True))


def _safe(together: dict[float, Effect]) -> tuple[float, float] | None:
    """(0, the largest measured strength up to which the negative completions stay likely)."""
    safe = 0.0
    for strength in STRENGTHS:
        if together[strength].negative > MAX_DAMAGE:
            break
        safe = strength
    return (0.0, safe) if safe else None


def _promoted(model: SplitModel, tokenizer: Any, d_D: Tensor) -> tuple[str, ...]:
    return tuple(tokenizer.decode([i]) for i in model.promoted_tokens(d_D[None], 6)[0])


def _describe(controls: Controls) -> dict[str, Any]:
    means = torch.tensor([e.mean for e in controls.random])
    return {
        "together": {f"{strength:g}": round(e.mean, 4) for strength, e in controls.together.items()},
        "together_se": round(controls.together[1.0].se, 4),
        "random_mean": round(float(means.mean()), 4),
        "random_sd": round(float(means.std()), 4),
        "random_together": round(controls.random_together.mean, 4),
        "delta_activation_together": round(controls.delta_activation.mean, 4),
        "difference_in_means": round(controls.difference_in_means.mean, 4),
    }
