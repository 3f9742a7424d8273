"""An attribution run: pairs → passes → scores → selected latents → measured effects → a bundle a hook point, in memory.

    1 the pairs are read, tokenised and split by prompt                  `pairs`
    2 one forward and one backward a completion, at all hook points      `gradients`, kept by `passes`
    3 every latent is scored, the leading live ones are selected         `moments`, `scores`, `ranking`
    4 each is intervened on, beside its controls, on held-out pairs      `interventions`, `validation`
    5 predictions are held against what was measured                     `fidelity`
    6 rows, evidence and provenance become a bundle                      `record`

A run that is killed or that fails goes on where it was when the same command comes again: its passes are in `Settings.work`.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from rich.progress import Progress
from torch import Tensor

from trimtab.attribution.authored import Authored
from trimtab.attribution.bundle import Bundle, ModelIdentity, Name
from trimtab.attribution.diffing import difference
from trimtab.attribution.edit import Operation
from trimtab.attribution.errors import FidelityError, GradientError, SAEError, SettingsError
from trimtab.attribution.fidelity import MIN_PEARSON
from trimtab.attribution.gradients import BATCH_TOKENS, SINK_NORM, STEPS, Gradient, Scope, Tracing
from trimtab.attribution.interventions import Measured, intervene, n_interventions
from trimtab.attribution.model import SplitModel, identify, load_tokenizer, special_tokens
from trimtab.attribution.pairs import Completion, Pair, load_pairs, split, tokenise
from trimtab.attribution.passes import Passes, digest_of
from trimtab.attribution.processes import Processes
from trimtab.attribution.ranking import Ranking, rank
from trimtab.attribution.record import bundle_of, layer_summary, rival_of
from trimtab.attribution.sae import SAE
from trimtab.attribution.stats import Stats, measure_stats, residuals
from trimtab.attribution.validation import Effects, Margins

__all__ = ["Dtype", "Result", "Settings", "attribute"]

Dtype = Literal["auto", "float32", "bfloat16"]
DTYPES: dict[Dtype, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
MIN_AGREEMENT = 0.7
"""Of a top-k SAE with the threshold it is read at, on the held-out pairs."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked for."""

    pairs: Path
    saes: tuple[Path | str, ...]
    """Folder, file or hub id of one SAE for each hook point."""
    model: str
    name: str
    behaviour: str
    operation: Operation = "add"
    amount: float | None = None
    """`add`: amount; `clamp`: target; `scale`: factor; none for ablate and project."""
    unit: Literal["raw", "max_act"] = "raw"
    scope: Scope = "completion"
    exclude_special: bool = False
    """Leave the tokenizer's special tokens alone, in scores, interventions and the recommended edits."""
    gradient: Gradient = "plain"
    diff_model: str | None = None
    """The model that `model` was fine-tuned from, to score by model diffing too."""
    top: int = 10
    """Latents in the bundle; the recommended edits act on all of them."""
    held_out: float = 0.35
    """Fraction of the prompts kept for validation."""
    n_validation: int = 24
    """Held-out pairs that are measured, at most."""
    batch_tokens: int = BATCH_TOKENS
    allow_low_fidelity: bool = False
    """Write a bundle whose predictions do not agree with what was measured; its provenance says that it failed."""
    dtype: Dtype = "auto"
    """Of the model: bf16 on CUDA and fp32 elsewhere, or as it is said."""
    tensor_parallel: bool = False
    """Under `torchrun`, share out the model over the processes and not the data."""
    work: Path | None = None
    """Folder to keep passes in, to resume from; None keeps them for this run alone."""
    command: str = ""
    """What a person types to run it again."""


@dataclass(frozen=True)
class Result:
    """A finished run at one hook point."""

    bundle: Bundle
    rival: Bundle
    """As many leaders by Δ-activation under the same edit: what a trial holds the bundle against."""
    ranking: Ranking
    measured: Measured

    @property
    def effects(self) -> Effects:
        """Every intervention on the held-out pairs."""
        return self.measured.effects


class _Data:
    """The pairs of a run, tokenised, and their names."""

    def __init__(self, settings: Settings) -> None:
        self.file = load_pairs(settings.pairs)
        self.train, held_out = split(self.file.pairs, settings.held_out)
        self.held_out = held_out[: settings.n_validation]

    def tokenise(self, model: str) -> None:
        tokenizer = load_tokenizer(model)
        self.tokenizer: Any = tokenizer
        self.train_tokens, self.held_out_tokens = (
            [c for pair in side for c in tokenise(tokenizer, pair)] for side in (self.train, self.held_out)
        )


def attribute(settings: Settings, progress: Progress, processes: Processes | None = None) -> tuple[Result, ...]:
    """Run the six stages; a result for each hook point, lowest first.

    Raises:
        AttributionError: the pairs, the SAE, the model or the disk cannot be used, or the predictions do not hold; the message
            says what to do.
    """
    started, processes = time.monotonic(), processes or Processes()
    edit = Authored.of(settings.operation, settings.amount, settings.unit, settings.scope, settings.exclude_special)
    _check_name(settings.name)
    data = _Data(settings)
    identity, _ = identify(settings.model)
    saes = _load_saes(settings, identity)
    data.tokenise(settings.model)
    model = SplitModel.load(
        settings.model,
        saes[0].layer,
        [sae.layer for sae in saes[1:]],
        dtype=DTYPES[settings.dtype],
        tensor_parallel=settings.tensor_parallel and processes.size > 1,
    )
    sites = [_Site.of(sae, model.at(sae.layer), data.held_out_tokens) for sae in saes]
    tracing = Tracing(
        scope=settings.scope,
        resid_norm={site.sae.layer: site.resid_norm for site in sites},
        gradient=settings.gradient,
        mean_D=sites[0].mean_D,
        left_alone=special_tokens(data.tokenizer) if settings.exclude_special else frozenset(),
    )
    with ExitStack() as stack:
        work = settings.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-")))
        work /= _digest(settings, data, model, tracing)
        train, held_out = (
            _passes(work / side, completions, pairs, model, tracing, processes, progress, settings.batch_tokens)
            for side, completions, pairs in (
                ("train", data.train_tokens, data.train),
                ("held-out", data.held_out_tokens, data.held_out),
            )
        )
        task = progress.add_task("interventions", total=len(sites) * n_interventions(settings.top))
        found: list[tuple[Ranking, Measured]] = []
        for site in sites:
            here = model.at(site.sae.layer)
            ranking = rank(
                train,
                site.sae,
                site.stats_of,
                edit,
                mean_D=site.mean_D,
                prompts=[pair.prompt_key for pair in data.train],
                processes=processes,
                top=settings.top,
                n_encoded=model.n_parameters,
            )
            if settings.diff_model is not None:
                other = SplitModel.load(settings.diff_model, site.sae.layer, dtype=model.dtype)
                ranking.scores.by["model_diffing"] = difference(
                    here, other, data.train_tokens, ranking.sae, settings.scope, site.resid_norm
                )
            pairs = list(zip(data.held_out_tokens[0::2], data.held_out_tokens[1::2], strict=True))
            prompts = [pair.prompt_key for pair in data.held_out]
            margins = Margins(here, pairs, prompts, settings.scope, tracing.left_alone)
            measured = intervene(
                margins,
                ranking,
                held_out,
                edit,
                n_pairs=len(pairs),
                processes=processes,
                work=work,
                advance=lambda n: progress.advance(task, n),
            )
            if not measured.fidelity.holds and not settings.allow_low_fidelity:
                raise FidelityError(_low_fidelity(measured, edit, ranking))
            found.append((ranking, measured))
    layers = [layer_summary(ranking, measured) for ranking, measured in found]
    provenance = {
        "command": settings.command,
        "pairs": {
            "file": settings.pairs.name,
            "digest": data.file.digest,
            "n": len(data.file.pairs),
            "prompts": data.file.n_prompts,
        },
        "train_pairs": len(data.train),
        "held_out_pairs": len(data.held_out),
        "gradient": settings.gradient
        if settings.gradient != "integrated"
        else f"integrated, {STEPS} steps to the mean",
        "masked": f"position 0 and tokens with ‖h‖ > {SINK_NORM:g} × the median"
        + (", special tokens" if settings.exclude_special else ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "processes": processes.size,
        "seconds": round(time.monotonic() - started, 1),
    }
    if settings.diff_model is not None:
        provenance["diff_model"] = settings.diff_model

    def promoted(d_D: Tensor) -> tuple[str, ...]:
        return tuple(data.tokenizer.decode([i]) for i in model.promoted_tokens(d_D[None], 6)[0])

    results = []
    for ranking, measured in found:
        bundle = bundle_of(
            ranking,
            edit,
            measured,
            promoted,
            name=settings.name,
            behaviour=settings.behaviour,
            model=identity,
            n_train=len(data.train),
            layers=layers,
            provenance=provenance,
        )
        results.append(
            Result(bundle, rival_of(bundle, ranking, edit, measured.by_activation, promoted), ranking, measured)
        )
    return tuple(results)


def _check_name(name: str) -> None:
    """Refuse at once what the bundle would refuse in the end."""
    try:
        TypeAdapter(Name).validate_python(name)
    except ValueError as e:
        raise SettingsError(
            f"{name!r} cannot name a bundle; use at most 64 letters, digits, '.', '_' and '-', a letter or digit first"
        ) from e


def _load_saes(settings: Settings, identity: ModelIdentity) -> list[SAE]:
    """The SAEs, lowest hook point first, each fit for the model and for a bundle."""
    saes = sorted((SAE.load(source) for source in settings.saes), key=lambda sae: sae.layer)
    layers = [sae.layer for sae in saes]
    if len(set(layers)) < len(layers):
        raise SettingsError(f"the SAEs read blocks {layers}; give at most one for each block")
    if len(saes) > 1 and settings.gradient == "integrated":
        raise SettingsError(
            "integrated gradients follow a path of their own at each hook point; give one SAE at a time"
        )
    for sae in saes:
        sae.check_model(identity)
        if sae.normalisation != "none":
            raise SAEError(
                f"SAE {sae.id} cannot become a bundle, whose rows are read alone: {sae.unreadable}; give another"
            )
    return saes


@dataclass(frozen=True)
class _Site:
    """One hook point before its latents are scored."""

    sae: SAE
    """Each latent can be read alone."""
    h_ND: Tensor | None
    """The stream over the held-out pairs, sinks left out; None where the SAE has its own statistics and thresholds."""
    mean_D: Tensor
    resid_norm: float

    @classmethod
    def of(cls, sae: SAE, model: SplitModel, held_out: list[Completion]) -> _Site:
        sae = sae.on(model.device)
        if sae.stats is not None and sae.k is None:
            return cls(sae, None, sae.stats.mean_D, sae.stats.resid_norm)
        h_ND, resid_norm = residuals(model, held_out)
        if sae.k is not None:
            sae, agreement = sae.thresholded(h_ND)
            if agreement < MIN_AGREEMENT:
                raise SAEError(f"SAE {sae.id}: {sae.notes[-1]}, below {MIN_AGREEMENT:.0%}; give one with a threshold")
        if sae.stats is not None:
            return cls(sae, h_ND, sae.stats.mean_D, sae.stats.resid_norm)
        return cls(sae, h_ND, h_ND.mean(0), resid_norm)

    def stats_of(self, sae: SAE) -> Stats:
        """The statistics of `sae`, which is ours or some latents of it."""
        if sae.stats is not None:
            return sae.stats
        assert self.h_ND is not None  # `of` measures it for an SAE without statistics.
        return measure_stats(sae, self.h_ND, self.resid_norm)


def _digest(settings: Settings, data: _Data, model: SplitModel, tracing: Tracing) -> str:
    """The name of what passes depend on."""
    mean = tracing.mean_D if tracing.gradient == "integrated" else None
    return digest_of(
        model=model.identity.fingerprint,
        dtype=str(model.dtype),
        layers=[model.layer, *model.above],
        train=[[*c.ids, c.n_prompt] for c in data.train_tokens],
        held_out=[[*c.ids, c.n_prompt] for c in data.held_out_tokens],
        scope=tracing.scope,
        gradient=tracing.gradient,
        resid_norm=list(tracing.resid_norm.values()),
        mean=None if mean is None else mean.tolist(),
        left_alone=sorted(tracing.left_alone),
        batch_tokens=settings.batch_tokens,
    )


def _passes(
    folder: Path,
    completions: list[Completion],
    pairs: list[Pair],
    model: SplitModel,
    tracing: Tracing,
    processes: Processes,
    progress: Progress,
    batch_tokens: int,
) -> Passes:
    """The passes over some pairs, made where they are not there yet."""
    task = progress.add_task(f"gradients, {folder.name}", total=len(completions))
    passes = Passes(folder, completions, processes, device=model.device, batch_tokens=batch_tokens)
    n_processes = processes.size if processes.sharing else 1
    try:
        passes.make(model, tracing, lambda n: progress.advance(task, n * n_processes))
    except GradientError as e:
        pair, kind = pairs[e.completion // 2], ("positive", "negative")[e.completion % 2]
        raise GradientError(
            e.completion,
            f"the gradient of pair {pair.id!r}, {kind} completion, is not finite; remove the pair, or give --dtype float32",
        ) from e
    return passes


def _low_fidelity(measured: Measured, edit: Authored, ranking: Ranking) -> str:
    fidelity = measured.fidelity
    return (
        f"the predictions do not hold at block {ranking.sae.layer}: predicted and measured effects of "
        f"{len(fidelity.points)} latents correlate at {fidelity.pearson:.2f}, below {MIN_PEARSON}; try a smaller --amount or "
        f"another --operation than {edit.operation}, or write it anyway, marked as failed, with --allow-low-fidelity"
    )
