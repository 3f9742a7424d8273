"""What moves a behaviour furthest, at one length: sums of a method's leaders, gradients, differences in means, of three blocks.

A leader alone is one of thousands, and a bundle serves several. So each method gives one direction here, the sum of the unit
directions of its first leaders, which stands beside the dense ones that need no SAE:

    difference in means   mean activation on the completions that show it, minus that on those that lack it
    gradient              −Σ g, along which the loss gap between the two kinds falls fastest
    gradient by RelP      the same by RelP's rules: norms, gates and attention patterns are held fixed (`linearise`)

All come from the train pairs, are scaled to `LENGTH` of their block's median ‖h‖, added to every completion token and taken from
it, and judged on held-out prompts, as in `reproduction`, of which this is a stage; more prompts than there, for there are fewer
directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from docs import reproduction as reproduce
from trimtab.attribution.bundle import Bundle, Header, ModelIdentity, RecommendedEdit, SAEIdentity, VectorRecord
from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.attribution.graders import load_grader
from trimtab.attribution.gradients import Tracing
from trimtab.attribution.journal import Journal
from trimtab.attribution.model import SplitModel, load_tokenizer
from trimtab.attribution.moments import Moments
from trimtab.attribution.pairs import load_pairs, split, tokenise
from trimtab.attribution.progress import bars
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.ranking import Ranking
from trimtab.attribution.sae import SAE, shipped_sae
from trimtab.attribution.selection import leading, random_live
from trimtab.attribution.serving import serving
from trimtab.attribution.stats import residuals
from trimtab.attribution.trial.arms import UNSTEERED, Arm
from trimtab.attribution.trial.cells import Cell, Sampled, sample_cells, verdicts
from trimtab.attribution.trial.endpoint import Endpoint
from trimtab.attribution.validation import Margins
from trimtab.client import Vector


class Direction(NamedTuple):
    """One direction of each behaviour."""

    name: str
    """In the bundle."""
    layer: int
    label: str


LEADERS = 16
HOOK = 14
"""The block of the shipped SAE."""
REFERENCE = Direction("means-14", HOOK, "difference in means")
"""What the others are held against."""
DIRECTIONS = (
    REFERENCE,
    Direction("means-8", 8, "difference in means, block 8"),
    Direction("means-20", 20, "difference in means, block 20"),
    Direction("gradient-14", HOOK, "gradient"),
    Direction("gradient-8", 8, "gradient, block 8"),
    Direction("gradient-20", 20, "gradient, block 20"),
    Direction("relp-14", HOOK, "gradient by RelP"),
    Direction("sum-attribution", HOOK, f"{LEADERS} by Δ-attribution"),
    Direction("sum-activation", HOOK, f"{LEADERS} by Δ-activation"),
    Direction("sum-gradient", HOOK, f"{LEADERS} by steering gradient"),
    Direction("sum-relp", HOOK, f"{LEADERS} by steering gradient, RelP"),
    Direction("sum-random", HOOK, f"{LEADERS} at random"),
)
LAYERS = tuple(sorted({direction.layer for direction in DIRECTIONS}))
SIZE = reproduce.Size(latents=LEADERS, prompts=12, pairs=12, tokens=32)
SEEDS = 6
"""Replies to a prompt, each way."""
Values = dict[str, dict[str, dict[str, float]]]
"""Direction → sign → prompt → value."""


def run(behaviours: Sequence[reproduce.Behaviour], url: str | None) -> None:
    """Make, measure and sample what is missing."""
    for behaviour in behaviours:
        if not there(behaviour):
            _make(behaviour)
        _measure(behaviour)
    with serving(url, EMBEDDED_MODEL, flags=("--max-num-seqs", "64")) as address:
        for behaviour in behaviours:
            _sample(behaviour, address)


def there(behaviour: reproduce.Behaviour) -> bool:
    """Whether its directions were made."""
    return all(_file(behaviour, layer).exists() for layer in LAYERS)


def margins(behaviour: reproduce.Behaviour) -> Values:
    """Change of each prompt's margin, nats per token; above 0 is towards the behaviour."""
    bundles, found = _bundles(behaviour), Values()
    with Journal.open(_journal(behaviour, "margins"), _asked(bundles)) as journal:
        for direction, key in product(DIRECTIONS, (p.key for p in reproduce.held_out_prompts(behaviour, SIZE))):
            for sign in reproduce.SIGNS:
                if (of := f"{key}/{direction.name}/{sign:+g}") in journal:
                    found.setdefault(direction.label, {}).setdefault(f"{sign:+g}", {})[key] = journal[of]["margin"]
    return found


def rates(behaviour: reproduce.Behaviour, verdict: str) -> Values:
    """Fraction of each prompt's replies with that verdict; of `unsteered`, at +0, too."""
    bundles, sampled = _bundles(behaviour), _sampled()
    of: dict[tuple[str, str, str], list[bool]] = {}
    with Journal.open(_journal(behaviour, "texts"), _asked(bundles) | vars(sampled)) as journal:
        for cell, found in verdicts(journal, _cells(behaviour, bundles), load_grader(behaviour.grader)):
            of.setdefault((cell.arm.name, f"{cell.strength:+g}", cell.prompt.key), []).append(found == verdict)
    values = Values()
    for (label, sign, key), each in of.items():
        values.setdefault(label, {}).setdefault(sign, {})[key] = float(np.mean(each))
    return values


def _file(behaviour: reproduce.Behaviour, layer: int) -> Path:
    return reproduce.BUILD / f"{behaviour.name}.directions.{layer}.safetensors"


def _journal(behaviour: reproduce.Behaviour, what: str) -> Path:
    return reproduce.BUILD / f"{behaviour.name}.directions.{what}.jsonl"


def _bundles(behaviour: reproduce.Behaviour) -> dict[int, Bundle]:
    return {layer: Bundle.load(_file(behaviour, layer)) for layer in LAYERS}


def _asked(bundles: dict[int, Bundle]) -> dict[str, object]:
    return {"bundles": [bundle.content_hash for bundle in bundles.values()]}


def _sampled() -> Sampled:
    return Sampled(reproduce.TEMPERATURE, SIZE.tokens)


def _make(behaviour: reproduce.Behaviour) -> None:
    """Every direction, of the train pairs; a bundle for each block."""
    sae, tokenizer = SAE.load(shipped_sae()), load_tokenizer(EMBEDDED_MODEL)
    train = split(load_pairs(behaviour.pairs).pairs, reproduce.HELD_OUT)[0]
    completions = [c for pair in train for c in tokenise(tokenizer, pair)]
    models = {layer: SplitModel.load(EMBEDDED_MODEL, layer) for layer in LAYERS}
    norms = {layer: residuals(model, completions)[1] for layer, model in models.items()}
    norms[HOOK] = reproduce.stats_of(sae).resid_norm
    found: dict[str, Tensor] = {}
    rankings: dict[str, Ranking] = {}
    for gradient, layers in (("plain", LAYERS), ("relp", (HOOK,))):
        tracing = Tracing("completion", {layer: norms[layer] for layer in layers}, gradient=gradient)  # type: ignore[arg-type]
        name = f"{behaviour.name}.directions.{gradient}"
        model = SplitModel.load(EMBEDDED_MODEL, layers[0], layers[1:])
        passes = reproduce.passes_over(name, model, completions, tracing)
        rankings[gradient] = reproduce.ranked(passes, sae, models[HOOK], train, SIZE)
        for layer in layers:
            zero_D = torch.zeros(models[layer].identity.d_model)
            moments = Moments.over(passes.factors(layer), zero_D, len(train))
            found[f"{'gradient' if gradient == 'plain' else 'relp'}-{layer}"] = -moments.g_D
            found.setdefault(f"means-{layer}", moments.a_2D[0] - moments.a_2D[1])
    found |= _sums(sae, rankings)
    for layer, model in models.items():
        _save(behaviour, layer, model.identity, sae, norms[layer], found)


def _sums(sae: SAE, rankings: dict[str, Ranking]) -> dict[str, Tensor]:
    """Of the leaders of each method, and of random live latents as active as those."""
    plain, relp = (reproduce.by_method(rankings[gradient]) for gradient in ("plain", "relp"))
    methods = {
        "sum-attribution": plain["Δ-attribution"],
        "sum-activation": plain["Δ-activation"],
        "sum-gradient": plain["steering gradient"],
        "sum-relp": relp["steering gradient"],
    }
    ranking, found, named = rankings["plain"], {}, set[int]()
    for name, (score_L, sign_L) in methods.items():
        best = leading(score_L, ranking.live_L, sae.d_LD, LEADERS)
        found[name] = sign_L[best].float() @ normalize(sae.d_LD[best], dim=-1)
        named |= set(best)
    random = random_live(ranking.live_L, sorted(named), ranking.scores.activation_L, LEADERS)
    return found | {"sum-random": normalize(sae.d_LD[random], dim=-1).sum(0)}


def _save(
    behaviour: reproduce.Behaviour,
    layer: int,
    model: ModelIdentity,
    sae: SAE,
    resid_norm: float,
    found: dict[str, Tensor],
) -> None:
    here = [direction for direction in DIRECTIONS if direction.layer == layer]
    none, none_D = torch.zeros(0).numpy(), torch.zeros(0, model.d_model).numpy()
    header = Header(
        name=f"directions-{behaviour.name}-{layer}",
        behaviour=behaviour.sentence,
        created="2026-11-26T00:00:00Z",  # of the recipe: the same run writes the same bytes
        model=model,
        sae=SAEIdentity(id=sae.id, digest=sae.digest, d_sae=sae.d_sae),
        layer=layer,
        resid_norm=resid_norm,
        latents=(),
        vectors=tuple(VectorRecord(name=d.name, source=f"{d.label}, unit length", norm=1.0) for d in here),
        edits=(
            RecommendedEdit(
                vector=here[0].name, operation="add", amount=reproduce.LENGTH, unit="resid_norm", scope="completion"
            ),
        ),
    )
    vectors_VD = normalize(torch.stack([found[d.name].float() for d in here]), dim=-1).numpy()
    Bundle(header, decoder=none_D, encoder=none_D, bias=none, threshold=none, baseline=none, vectors=vectors_VD).save(
        _file(behaviour, layer)
    )


def _measure(behaviour: reproduce.Behaviour) -> None:
    """The margin of each prompt that is asked, by its last pair, under each direction, both ways."""
    bundles = _bundles(behaviour)
    wanted = {prompt.key for prompt in reproduce.held_out_prompts(behaviour, SIZE)}
    held_out = split(load_pairs(behaviour.pairs).pairs, reproduce.HELD_OUT)[1]
    pairs = {key: pair for pair in held_out if (key := Prompt(pair.prompt, pair.messages).key) in wanted}
    total = len(pairs) * len(DIRECTIONS) * len(reproduce.SIGNS)
    with Journal.open(_journal(behaviour, "margins"), _asked(bundles)) as journal, bars() as advance:
        if len(journal) == total:
            return
        tokenizer = load_tokenizer(EMBEDDED_MODEL)
        for layer, bundle in bundles.items():
            model, amount = SplitModel.load(EMBEDDED_MODEL, layer), reproduce.LENGTH * bundle.header.resid_norm
            for key, pair in pairs.items():
                keys = [f"{key}/{v.name}/{sign:+g}" for v in bundle.header.vectors for sign in reproduce.SIGNS]
                if all(k in journal for k in keys):
                    continue
                rows = [
                    reproduce.row_of(torch.from_numpy(u_D), sign * amount)
                    for u_D in bundle.vectors
                    for sign in reproduce.SIGNS
                ]
                effects = Margins(model, [tokenise(tokenizer, pair)], [key], "completion").effects(rows)
                for k, effect in zip(keys, effects, strict=True):
                    if k not in journal:
                        journal.add(k, {"margin": effect.mean})
                advance(f"{behaviour.name} margins of directions", len(journal), total)


def _cells(behaviour: reproduce.Behaviour, bundles: dict[int, Bundle]) -> list[Cell]:
    arms = [UNSTEERED]
    for direction in DIRECTIONS:
        vector = Vector(bundles[direction.layer].header.name, direction.name)
        edit = vector.add(reproduce.LENGTH, unit="resid_norm").during("completion")
        arms.append(Arm(direction.label, (edit,)))
    return [
        Cell(arm, strength, prompt, seed, False)
        for arm in arms
        for strength in (reproduce.SIGNS if arm.has_strength else (0.0,))
        for prompt in reproduce.held_out_prompts(behaviour, SIZE)
        for seed in range(SEEDS)
    ]


def _sample(behaviour: reproduce.Behaviour, url: str) -> None:
    """Sample and grade the replies that are not there yet."""
    bundles, sampled = _bundles(behaviour), _sampled()
    with (
        Endpoint.open(url, EMBEDDED_MODEL, None, list(bundles.values())) as endpoint,
        Journal.open(_journal(behaviour, "texts"), _asked(bundles) | vars(sampled)) as journal,
        bars() as advance,
    ):
        sample_cells(
            journal,
            endpoint,
            _cells(behaviour, bundles),
            sampled,
            load_grader(behaviour.grader),
            n_parallel=64,
            advance=advance,
        )
