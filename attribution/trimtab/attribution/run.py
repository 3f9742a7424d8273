"""An attribution run: pairs → traces → scores → selected latents → measured effects → a bundle in memory.

    1 the pairs are read, tokenised and split by prompt               `pairs`
    2 one forward and one backward a train completion                 `gradients`
    3 every latent is scored                                          `scores`
    4 the leading live latents are selected                           `selection`
    5 each is intervened on, beside its controls, on held-out pairs   `validation`
    6 rows, evidence and provenance become a bundle                   `bundle`

Nothing is written here: a run that fails leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from rich.progress import Progress
from torch import Tensor

from trimtab.attribution.authored import Authored, vector_rows
from trimtab.attribution.bundle import Bundle, Header, LatentRecord, Name, SAEIdentity, VectorRecord, now
from trimtab.attribution.edit import Operation, Rows, project_rows
from trimtab.attribution.errors import SAEError, SettingsError
from trimtab.attribution.gradients import Scope, Trace, traces
from trimtab.attribution.model import SplitModel, identify, load_tokenizer
from trimtab.attribution.pairs import Completion, Pair, load_pairs, split, tokenise
from trimtab.attribution.sae import SAE
from trimtab.attribution.scores import Scores, Sums, clustered_se, pair_scores, score
from trimtab.attribution.selection import leading, random_live
from trimtab.attribution.stats import Stats, measure_stats, residuals
from trimtab.attribution.validation import MAX_DAMAGE, STRENGTHS, Effect, Effects, Margins

__all__ = ["Result", "Settings", "attribute"]

N_STANDARD_ERRORS = 200
"""Leading latents that get a standard error."""


MIN_AGREEMENT = 0.7
"""Of a top-k SAE with the threshold it is read at, on the held-out pairs."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked for."""

    pairs: Path
    sae: Path | str
    """Folder, file or hub id."""
    model: str
    name: str
    behaviour: str
    operation: Operation = "add"
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
class Result:
    """A finished run."""

    bundle: Bundle
    effects: Effects
    scores: Scores


def attribute(settings: Settings, progress: Progress) -> Result:
    """Run the six stages.

    Raises:
        AttributionError: the pairs, the SAE or the model cannot be used; the message says what to do.
    """
    started = time.monotonic()
    edit = Authored.of(settings.operation, settings.amount, settings.unit, settings.scope)
    _check_name(settings.name)
    file = load_pairs(settings.pairs)
    train, held_out = split(file.pairs, settings.held_out)
    held_out = held_out[: settings.n_validation]
    sae = SAE.load(settings.sae)
    identity, _ = identify(settings.model)
    sae.check_model(identity)
    if sae.normalisation != "none":
        raise SAEError(
            f"SAE {sae.id} cannot become a bundle, whose rows are read alone: {sae.unreadable}; give another"
        )
    tokenizer = load_tokenizer(settings.model)
    tokens, held_out_tokens = ([tokenise(tokenizer, pair) for pair in side] for side in (train, held_out))
    model = SplitModel.load(settings.model, sae.layer)
    h_ND, resid_norm = residuals(model, [c for pair in held_out_tokens for c in pair])
    if sae.k is not None:
        sae, agreement = sae.thresholded(h_ND)
        if agreement < MIN_AGREEMENT:
            raise SAEError(f"SAE {sae.id}: {sae.notes[-1]}, below {MIN_AGREEMENT:.0%}; give one with a threshold")
    stats = sae.stats or measure_stats(sae, h_ND, resid_norm)

    positive, negative = _traces(model, tokens, settings.scope, stats, progress)
    sums = Sums.over(positive, sae, stats.mean_D), Sums.over(negative, sae, stats.mean_D)
    scores = score(*sums, sae, edit.operation, edit.amounts(stats))
    live_L = (stats.density_L > 0) & scores.fires_L
    best = leading(scores.operation_L, live_L, sae.d_LD, settings.top)
    se = _standard_errors(positive, negative, sae, scores.operation_L, live_L, edit, stats, train)

    margins = Margins(model, held_out_tokens, [pair.prompt_key for pair in held_out], settings.scope)
    towards = -scores.delta_activation_L if edit.turns_up else scores.delta_activation_L
    effects = _effects(
        margins,
        lambda latents, strength: edit.rows(sae, stats, latents, strength),
        best,
        control=random_live(live_L, best, sums[0].phi_L + sums[1].phi_L, max(10, len(best))),
        by_activation=leading(towards, live_L, sae.d_LD, len(best)),
        difference_in_means=vector_rows(scores.difference_in_means_D, -1.0),
        progress=progress,
    )
    header = Header(
        name=settings.name,
        behaviour=settings.behaviour,
        created=now(),
        model=identity,
        sae=SAEIdentity(id=sae.id, digest=sae.digest, d_sae=sae.d_sae),
        layer=sae.layer,
        resid_norm=stats.resid_norm,
        latents=tuple(
            LatentRecord(
                latent=latent,
                attribution=float(scores.operation_L[latent]),
                attribution_se=se.get(latent),
                attribution_project=float(scores.project_L[latent]),
                delta_activation=float(scores.delta_activation_L[latent]),
                effect=effects.each[latent].mean,
                effect_se=effects.each[latent].se,
                max_activation=float(stats.max_activation_L[latent]),
                density=float(stats.density_L[latent]),
                strength_range=effects.safe,
                top_tokens=sae.top_tokens.get(latent) or _promoted(model, tokenizer, sae.d_LD[latent]),
            )
            for latent in best
        ),
        vectors=(
            VectorRecord(
                name="difference_in_means",
                source=f"mean residual on positive minus negative completions of {len(train)} train pairs",
                norm=float(scores.difference_in_means_D.norm()),
            ),
        ),
        edits=tuple(edit.recommended(latent) for latent in best),
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
            "scored_operation": {"operation": edit.operation, "amount": edit.amount, "unit": edit.unit},
            "stats": stats.source,
            "sae": list(sae.notes),
            "max_damage": MAX_DAMAGE,
            "effects": effects.summary(),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    return Result(_bundle(header, sae, stats, best, scores.difference_in_means_D), effects, scores)


def _check_name(name: str) -> None:
    """Refuse at once what the bundle would refuse in the end."""
    try:
        TypeAdapter(Name).validate_python(name)
    except ValueError as e:
        raise SettingsError(
            f"{name!r} cannot name a bundle; use at most 64 letters, digits, '.', '_' and '-', a letter or digit first"
        ) from e


def _traces(
    model: SplitModel, tokens: list[tuple[Completion, Completion]], scope: Scope, stats: Stats, progress: Progress
) -> tuple[list[Trace], list[Trace]]:
    """Traces of the positive and of the negative completions, pair by pair."""
    completions = [completion for pair in tokens for completion in pair]
    task = progress.add_task("gradients", total=len(completions))
    found = traces(
        model,
        completions,
        scope=scope,
        resid_norm=stats.resid_norm,
        advance=lambda n: progress.advance(task, n),
    )
    return found[0::2], found[1::2]


def _standard_errors(
    positive: list[Trace],
    negative: list[Trace],
    sae: SAE,
    score_L: Tensor,
    live_L: Tensor,
    edit: Authored,
    stats: Stats,
    train: list[Pair],
) -> dict[int, float]:
    """Standard errors of the leading live latents' scores, clustered by prompt."""
    order = score_L.where(live_L, score_L.new_tensor(float("-inf"))).argsort(descending=True)
    latents = order[: min(N_STANDARD_ERRORS, int(live_L.sum()))]
    each = pair_scores(positive, negative, sae, latents, edit.operation, edit.amounts(stats), stats.mean_D)
    errors_C = clustered_se(each.operation_PC, [pair.prompt_key for pair in train])
    return dict(zip(latents.tolist(), errors_C.tolist(), strict=True))


def _effects(
    margins: Margins,
    rows_of: Callable[[list[int], float], Rows],
    best: list[int],
    *,
    control: list[int],
    by_activation: list[int],
    difference_in_means: Rows,
    progress: Progress,
) -> Effects:
    """Intervene on the leading latents and on everything that they are held against."""
    task = progress.add_task("interventions", total=len(best) + len(STRENGTHS) + len(control) + 3)

    def effect(rows: Rows) -> Effect:
        progress.advance(task)
        return margins.effect(rows)

    return Effects(
        each={latent: effect(rows_of([latent], 1.0)) for latent in best},
        together={strength: effect(rows_of(best, strength)) for strength in STRENGTHS},
        random=tuple(effect(rows_of([latent], 1.0)) for latent in control),
        random_together=effect(rows_of(control[: len(best)], 1.0)),
        delta_activation=effect(rows_of(by_activation, 1.0)),
        difference_in_means=effect(difference_in_means),
    )


def _promoted(model: SplitModel, tokenizer: Any, d_D: Tensor) -> tuple[str, ...]:
    """The tokens whose logits a direction raises most."""
    return tuple(tokenizer.decode([i]) for i in model.promoted_tokens(d_D[None], 6)[0])


def _bundle(header: Header, sae: SAE, stats: Stats, latents: list[int], difference_in_means_D: Tensor) -> Bundle:
    d_KD = sae.d_LD[latents]
    return Bundle(
        header,
        decoder=d_KD.numpy(),
        encoder=sae.e_LD[latents].numpy(),
        bias=sae.b_L[latents].numpy(),
        threshold=sae.theta_L[latents].numpy(),
        baseline=(project_rows(d_KD)[0] @ stats.mean_D).numpy(),
        vectors=difference_in_means_D[None].numpy(),
    )
