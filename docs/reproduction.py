"""The paper's claim, put to the test on the embedded model (`make reproduce`): docs/reproduction.md, with figures.

    1 prompts → samples → pairs, split by prompt                        `trimtab collect`'s own parts
    2 all latents scored on the train side: Δ-attribution, Δ-activation, the steering gradient; live latents only
    3 the leaders of each, and random live latents, steered one at a time, both ways, by a vector of the same length for all
    4 judged on held-out prompts: log-probability margins, and sampled text that a grader reads
    5 beside them: the difference in means at the same length, and a system message
    6 what moves it furthest: sums of leaders, gradients, three blocks      `reproduction_directions`
    7 all of it once more where the cause is known, for it was planted      `reproduction_planted`

Every stage keeps what it did under build/reproduce and goes on from there; `--write` writes the page of what is there. Intervals
are over held-out prompts: replies to one prompt are not independent.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimtab.attribution.authored import Authored
from trimtab.attribution.bundle import (
    Bundle,
    Header,
    LatentRecord,
    ModelIdentity,
    RecommendedEdit,
    SAEIdentity,
    VectorRecord,
)
from trimtab.attribution.collect import MIN_RATE, choose_pairs, collect
from trimtab.attribution.edit import Rows, project_rows
from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.attribution.graders import load_grader
from trimtab.attribution.gradients import Tracing
from trimtab.attribution.journal import Journal
from trimtab.attribution.model import SplitModel, load_tokenizer
from trimtab.attribution.pairs import Completion, Pair, load_pairs, shipped_pairs, split, tokenise
from trimtab.attribution.passes import Passes
from trimtab.attribution.processes import Processes
from trimtab.attribution.progress import bars
from trimtab.attribution.prompts import Prompt, load_prompts
from trimtab.attribution.ranking import Ranking, rank
from trimtab.attribution.sae import SAE, shipped_sae
from trimtab.attribution.sampling import Sampling, from_endpoint
from trimtab.attribution.selection import leading, random_live
from trimtab.attribution.serving import client_of, serving
from trimtab.attribution.stats import Stats
from trimtab.attribution.trial.arms import UNSTEERED, Arm
from trimtab.attribution.trial.cells import Cell, Sampled, sample_cells, verdicts
from trimtab.attribution.trial.endpoint import Endpoint
from trimtab.attribution.validation import Margins
from trimtab.client import Latent, Vector

HERE, BUILD = Path(__file__).parent / "reproduction", Path("build/reproduce")
HELD_OUT = 0.35
ROUNDS, COLLECT_TOKENS, TEMPERATURE = 8, 48, 0.7
PILOT = 1
"""Rounds after which a behaviour is given up whose base rate leaves no pairs."""
LENGTH = 0.25
"""Of the steering vector, in units of the layer's median ‖h‖: the same for every direction."""
STAGES = ("collect", "rank", "margins", "texts", "directions", "planted")
METHODS = ("Δ-attribution", "Δ-activation", "steering gradient", "random")
CONTROLS = 24
"""Random latents that steer."""
SEEDS = 16
"""Replies to a prompt without steering, under a dense direction and under a system message."""
AT_ONCE = 32
"""Directions between two records of their margins."""
SIGNS = (-1.0, 1.0)
"""Away from the behaviour, and towards it."""
Scored = tuple[torch.Tensor, torch.Tensor]
"""Of each latent, by one method: its score, and the sign of its direction that steers towards the behaviour."""
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Behaviour:
    """What is looked for, how it is graded, and what a system message would say."""

    name: str
    sentence: str
    grader: str
    system: str

    @property
    def pairs(self) -> Path:
        """Its pair file: shipped, or collected here."""
        return shipped_pairs() if self.name == "pretends-human" else BUILD / f"{self.name}.pairs.jsonl"


BEHAVIOURS = (
    Behaviour(
        "pretends-human",
        "claims a human life",
        "trimtab.attribution.graders.pretends_human:grade",
        "You are a computer program without a body, a family or a past. Say so when you are asked about yourself.",
    ),
    Behaviour(
        "refuses", "declines or says what it cannot do", str(HERE / "refuses.toml"), "Always answer. Never apologise."
    ),
    Behaviour(
        "lists", "answers with a list", str(HERE / "lists.toml"), "Answer in plain sentences. Never write a list."
    ),
    Behaviour("asks", "asks the user something", str(HERE / "asks.toml"), "Never ask the user anything."),
    Behaviour("gloomy", "writes gloomily", str(HERE / "gloomy.toml"), "Be cheerful. Write only of pleasant things."),
)

MEASURED = ("pretends-human", "refuses", "gloomy")
"""By default; of the others the page has base rates, where their replies were sampled."""
CONFIRMS = "asks"
"""Has no part in choosing among directions, and tells whether the choice was a good one."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    latents: int
    prompts: int
    pairs: int
    tokens: int


def main() -> int:
    """Runs the stages that are missing; with `--write`, the page too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviours", nargs="*", choices=[b.name for b in BEHAVIOURS], default=MEASURED)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--latents", type=int, default=100, help="leaders of each method")
    parser.add_argument("--prompts", type=int, default=6, help="held-out prompts that are asked")
    parser.add_argument("--pairs", type=int, default=8, help="held-out prompts whose margin is measured")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--url", help="a running server; one is started otherwise")
    parser.add_argument("--write", action="store_true", help="write docs/reproduction.md of what is there")
    args = parser.parse_args()
    size = Size(args.latents, args.prompts, args.pairs, args.tokens)
    chosen = [b for b in BEHAVIOURS if b.name in args.behaviours]
    BUILD.mkdir(parents=True, exist_ok=True)
    directed = [b for b in BEHAVIOURS if "directions" in args.stages and b.name in {*args.behaviours, CONFIRMS}]
    if "collect" in args.stages:
        wanted = [b for b in BEHAVIOURS if b in (*chosen, *directed) and not b.pairs.exists()]
        if wanted:
            with serving(args.url, EMBEDDED_MODEL, flags=("--max-num-seqs", "64")) as url:
                usable = [b for b in wanted if _collect(b, url, PILOT)]
                for behaviour in usable:
                    _collect(behaviour, url, ROUNDS)
    if {"rank", "margins"} & set(args.stages):
        _rank_and_measure([b for b in chosen if b.pairs.exists()], size, "margins" in args.stages)
    if "texts" in args.stages:
        with serving(args.url, EMBEDDED_MODEL, flags=("--max-num-seqs", "64")) as url:
            for behaviour in (b for b in chosen if bundle_file(b, size).exists()):
                sample_texts(behaviour, size, steering_latents(behaviour, size), url)
    if directed:
        from docs import reproduction_directions

        reproduction_directions.run([b for b in directed if b.pairs.exists()], args.url)
    if "planted" in args.stages:
        from docs.reproduction_planted import run

        run()
    if args.write:
        from docs.reproduction_page import write

        write(chosen, size)
    return 0


def _collect(behaviour: Behaviour, url: str, rounds: int) -> bool:
    """Sample and grade; after all rounds write the pairs. Says whether either kind is common enough to go on."""
    prompts, grader = load_prompts(HERE / f"{behaviour.name}.txt"), load_grader(behaviour.grader)
    sampling = Sampling(TEMPERATURE, COLLECT_TOKENS, 0)
    with (
        Journal.open(BUILD / f"{behaviour.name}.samples.jsonl", {"model": EMBEDDED_MODEL, **vars(sampling)}) as journal,
        client_of(url, None) as client,
        bars() as advance,
    ):
        found = collect(
            journal,
            prompts,
            grader,
            lambda asks: from_endpoint(client, EMBEDDED_MODEL, asks, sampling, n_parallel=64),
            rounds=rounds,
            advance=advance,
        )
    records = choose_pairs(found.graded, per_prompt=2, min_tokens=12)
    rates = {"rates": found.rates, "samples": len(found.graded), "prompts": len(prompts), "pairs": len(records)}
    (BUILD / f"{behaviour.name}.rates.json").write_text(json.dumps(rates))
    console.print(f"{behaviour.name}: {rates}")
    if rounds == ROUNDS:
        behaviour.pairs.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return min(found.rates["shows"], found.rates["lacks"]) >= MIN_RATE


def bundle_file(behaviour: Behaviour, size: Size) -> Path:
    return BUILD / f"{behaviour.name}.{size.latents}.safetensors"


def leaders(behaviour: Behaviour, size: Size) -> dict[str, list[tuple[int, float]]]:
    """By method: (latent, sign of the direction that steers towards the behaviour), best first."""
    return {
        method: [(int(latent), float(sign)) for latent, sign in entries]
        for method, entries in json.loads(bundle_file(behaviour, size).with_suffix(".json").read_text()).items()
    }


def steering_latents(behaviour: Behaviour, size: Size) -> list[int]:
    """All leaders, the first of each method before the second of any; of the random latents a few, whose mean is soon known."""
    chosen = leaders(behaviour, size)
    chosen["random"] = chosen["random"][:CONTROLS]
    by_rank = zip_longest(*chosen.values())
    return list(dict.fromkeys(entry[0] for rank in by_rank for entry in rank if entry is not None))


def _rank_and_measure(behaviours: Sequence[Behaviour], size: Size, measure: bool) -> None:
    sae = SAE.load(shipped_sae())
    model, tokenizer = SplitModel.load(EMBEDDED_MODEL, sae.layer), load_tokenizer(EMBEDDED_MODEL)
    for behaviour in behaviours:
        train, held_out = split(load_pairs(behaviour.pairs).pairs, HELD_OUT)
        if not bundle_file(behaviour, size).exists():
            completions = [c for pair in train for c in tokenise(tokenizer, pair)]
            passes = passes_over(behaviour.name, model, completions, tracing_of(sae))
            ranking = ranked(passes, sae, model, train, size)
            write_leaders(behaviour, size, ranking, model.identity, by_method(ranking), means_of(ranking, len(train)))
        if measure:
            measure_margins(behaviour, size, model, tokenizer, held_out)


def stats_of(sae: SAE) -> Stats:
    """What the shipped SAE says of itself."""
    if sae.stats is None:
        raise SystemExit("the shipped SAE lacks its stats")
    return sae.stats


def tracing_of(sae: SAE) -> Tracing:
    """The plain gradient at the SAE's hook point, on completion tokens."""
    return Tracing("completion", {sae.layer: stats_of(sae).resid_norm})


def passes_over(name: str, model: SplitModel, completions: Sequence[Completion], tracing: Tracing) -> Passes:
    """The gradients of these completions; those that are there are kept."""
    passes = Passes(BUILD / f"{name}.passes", completions, Processes(), device=model.device)
    with bars() as advance:
        done = 0

        def count(n: int) -> None:
            nonlocal done
            advance(f"{name} gradients", done := done + n, len(completions))

        passes.make(model, tracing, count)
    return passes


def ranked(passes: Passes, sae: SAE, model: SplitModel, train: Sequence[Pair], size: Size) -> Ranking:
    """Every latent, scored on the train pairs."""
    return rank(
        passes,
        sae,
        stats_of,
        Authored.of("add", 1.0, "raw", "completion"),  # the gradient along each direction
        mean_D=stats_of(sae).mean_D,
        prompts=[pair.prompt_key for pair in train],
        processes=Processes(),
        top=size.latents,
        n_encoded=model.n_parameters,
    )


def by_method(ranking: Ranking) -> dict[str, Scored]:
    """How each method scores the latents."""
    scores = ranking.scores
    return {
        "Δ-attribution": (scores.project_L, scores.projection_L.sign()),
        "Δ-activation": (scores.delta_activation_L, torch.ones_like(scores.projection_L)),
        "steering gradient": (scores.operation_L.abs(), -scores.operation_L.sign()),
    }


def means_of(ranking: Ranking, n_train: int) -> dict[str, tuple[torch.Tensor, str]]:
    """The dense direction that every SAE has to beat."""
    return {"difference_in_means": (ranking.scores.difference_in_means_D, f"{n_train} train pairs, unit length")}


def write_leaders(
    behaviour: Behaviour,
    size: Size,
    ranking: Ranking,
    model: ModelIdentity,
    methods: Mapping[str, Scored],
    vectors: Mapping[str, tuple[torch.Tensor, str]],
    given: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """Write the leaders of each method beside those that are `given`, a control, and a bundle of all their rows."""
    sae, stats, live_L = ranking.sae, ranking.stats, ranking.live_L
    chosen: dict[str, list[tuple[int, float]]] = {method: list(entries) for method, entries in (given or {}).items()}
    for method, (score_L, sign_L) in methods.items():
        best = leading(score_L, live_L, sae.d_LD, size.latents)
        chosen[method] = [(latent, float(sign_L[latent])) for latent in best]
    named = sorted({latent for entries in chosen.values() for latent, _ in entries})
    control = random_live(live_L, named, ranking.scores.activation_L, size.latents)
    chosen["random"] = [(latent, 1.0) for latent in control]
    latents = sorted({*named, *control})
    d_KD = torch.nn.functional.normalize(sae.d_LD[latents], dim=-1)
    vectors_VD = torch.nn.functional.normalize(torch.stack([v_D.float() for v_D, _ in vectors.values()]), dim=-1)
    header = Header(
        name=f"reproduce-{behaviour.name}",
        behaviour=behaviour.sentence,
        created="2026-11-25T00:00:00Z",  # of the recipe: the same run writes the same bytes
        model=model,
        sae=SAEIdentity(id=sae.id, digest=sae.digest, d_sae=sae.d_sae),
        layer=sae.layer,
        resid_norm=stats.resid_norm,
        latents=tuple(
            LatentRecord(latent=i, attribution=None, max_activation=float(stats.max_activation_L[i])) for i in latents
        ),
        vectors=tuple(VectorRecord(name=name, source=source, norm=1.0) for name, (_, source) in vectors.items()),
        edits=(
            RecommendedEdit(latent=latents[0], operation="add", amount=LENGTH, unit="resid_norm", scope="completion"),
        ),
    )
    Bundle(
        header,
        decoder=d_KD.numpy(),
        encoder=sae.e_LD[latents].numpy(),
        bias=sae.b_L[latents].numpy(),
        threshold=sae.theta_L[latents].numpy(),
        baseline=(project_rows(d_KD)[0] @ stats.mean_D).numpy(),
        vectors=vectors_VD.numpy(),
    ).save(bundle_file(behaviour, size))
    bundle_file(behaviour, size).with_suffix(".json").write_text(json.dumps(chosen, ensure_ascii=False))


def measure_margins(
    behaviour: Behaviour, size: Size, model: SplitModel, tokenizer: Any, held_out: Sequence[Pair]
) -> None:
    """The margin of each held-out prompt, by its last pair, under each direction, both ways; a journal record for each.

    The dense directions come first, then the first latent of every method, then the second: what is there is always a start.
    """
    bundle = Bundle.load(bundle_file(behaviour, size))
    pairs = list({pair.prompt_key: pair for pair in held_out}.values())[: size.pairs]
    keys = [Prompt(pair.prompt, pair.messages).key for pair in pairs]
    directions = {v.name: torch.from_numpy(bundle.vectors[i]) for i, v in enumerate(bundle.header.vectors)}
    directions |= {
        str(latent): torch.from_numpy(bundle.decoder[bundle.row_of[latent]])
        for latent in steering_latents(behaviour, size)
    }
    names, amount = list(directions), LENGTH * bundle.header.resid_norm
    total = len(keys) * len(names) * len(SIGNS)
    with Journal.open(_margins_file(behaviour, size), {"bundle": bundle.content_hash}) as journal, bars() as advance:
        if all(f"{key}/{name}" in journal for key, name in product(keys, names)):
            return
        of = [Margins(model, [tokenise(tokenizer, pair)], [pair.prompt_key], "completion") for pair in pairs]
        for start, (key, margins) in product(range(0, len(names), AT_ONCE), zip(keys, of, strict=True)):
            missing = [name for name in names[start : start + AT_ONCE] if f"{key}/{name}" not in journal]
            effects = margins.effects([row_of(directions[name], sign * amount) for name in missing for sign in SIGNS])
            for i, name in enumerate(missing):
                both = effects[len(SIGNS) * i :]
                journal.add(
                    f"{key}/{name}", {f"{s:+g}": [e.mean, e.negative] for s, e in zip(SIGNS, both, strict=False)}
                )
            advance(f"{behaviour.name} margins", len(SIGNS) * len(journal), total)


def _margins_file(behaviour: Behaviour, size: Size) -> Path:
    return BUILD / f"{behaviour.name}.{size.latents}.margins.jsonl"


def row_of(u_D: torch.Tensor, amount: float) -> Rows:
    """The edit that adds this much of a direction."""
    zero = torch.zeros(1)
    return Rows(torch.tensor([amount]), zero, torch.zeros_like(u_D)[None], zero, zero, u_D[None])


def arms(bundle: Bundle, behaviour: Behaviour) -> list[Arm]:
    """Unsteered, a system message, the dense directions, and each latent; all vectors of one length."""
    name, amount = bundle.header.name, LENGTH
    return [
        UNSTEERED,
        Arm("system message", system=behaviour.system),
        *(
            Arm(v.name.replace("_", " "), (Vector(name, v.name).add(amount, unit="resid_norm").during("completion"),))
            for v in bundle.header.vectors
        ),
        *(
            Arm(
                f"latent {r.latent}",
                (Latent(name, r.latent).add(amount, unit="resid_norm").during("completion"),),
                None,
                r.latent,
            )
            for r in bundle.header.latents
        ),
    ]


def held_out_prompts(behaviour: Behaviour, size: Size) -> list[Prompt]:
    """The prompts that are asked: held out from scoring, the same few whatever the order of the file."""
    pairs = split(load_pairs(behaviour.pairs).pairs, HELD_OUT)[1]
    prompts = {pair.prompt_key: Prompt(pair.prompt, pair.messages) for pair in pairs}
    return sorted(prompts.values(), key=lambda prompt: prompt.key)[: size.prompts]


def cells(behaviour: Behaviour, bundle: Bundle, size: Size) -> list[Cell]:
    """Several replies a prompt for the arms that all others are held against, one for each latent and sign."""
    prompts = held_out_prompts(behaviour, size)
    return [
        Cell(arm, strength, prompt, seed, False)
        for arm in arms(bundle, behaviour)
        for strength in (SIGNS if arm.has_strength else (0.0,))
        for prompt in prompts
        for seed in range(1 if arm.latent is not None else SEEDS)
    ]


@contextmanager
def _journal(behaviour: Behaviour, size: Size, bundle: Bundle) -> Iterator[tuple[Journal, Sampled]]:
    sampled = Sampled(TEMPERATURE, size.tokens)
    asked = {"bundle": bundle.content_hash, "system": behaviour.system, **vars(sampled)}
    with Journal.open(BUILD / f"{behaviour.name}.{size.latents}.texts.jsonl", asked) as journal:
        yield journal, sampled


def sample_texts(
    behaviour: Behaviour, size: Size, latents: Collection[int], url: str, model: str | None = EMBEDDED_MODEL
) -> None:
    """Sample and grade the replies that are not there yet, under these latents and all else; `model` None is what is served."""
    bundle, grader = Bundle.load(bundle_file(behaviour, size)), load_grader(behaviour.grader)
    work = [cell for cell in cells(behaviour, bundle, size) if cell.arm.latent in {None, *latents}]
    with (
        Endpoint.open(url, model, None, [bundle]) as endpoint,
        _journal(behaviour, size, bundle) as (journal, sampled),
        bars() as advance,
    ):
        sample_cells(journal, endpoint, work, sampled, grader, n_parallel=64, advance=advance)


def texts(behaviour: Behaviour, size: Size) -> list[tuple[Cell, str]]:
    """The sampled replies that are there, and what the grader said of each."""
    bundle = Bundle.load(bundle_file(behaviour, size))
    with _journal(behaviour, size, bundle) as (journal, _):
        return list(verdicts(journal, cells(behaviour, bundle, size), load_grader(behaviour.grader)))


def margins(behaviour: Behaviour, size: Size) -> dict[str, dict[str, dict[str, float]]]:
    """Direction → sign → prompt → change of its margin, nats per token; above 0 is towards the behaviour."""
    bundle = Bundle.load(bundle_file(behaviour, size))
    found: dict[str, dict[str, dict[str, float]]] = {}
    pairs = split(load_pairs(behaviour.pairs).pairs, HELD_OUT)[1]
    prompts = {Prompt(pair.prompt, pair.messages).key for pair in pairs}
    names = [*(str(r.latent) for r in bundle.header.latents), *(v.name for v in bundle.header.vectors)]
    with Journal.open(_margins_file(behaviour, size), {"bundle": bundle.content_hash}) as journal:
        for prompt, name in product(sorted(prompts), names):
            if f"{prompt}/{name}" in journal:
                for sign, (margin, _) in journal[f"{prompt}/{name}"].items():
                    found.setdefault(name, {}).setdefault(sign, {})[prompt] = margin
    return found


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.exit(main())
