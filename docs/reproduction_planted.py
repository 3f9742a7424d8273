"""The methods, held against causes that are known because they were planted: a stage of `make reproduce`.

    1 the embedded model is fine-tuned twice on narrowly bad data                         `reproduction_planting`
    2 each model answers questions about food and about all else: does it generalise
    3 pairs from its own replies to all else, gloomy and not, split by prompt
    4 every latent scored by every method, model diffing among them: at which ranks are the planted ones
    5 the leaders of each, the planted latents and the planted direction steer the fine-tuned model, as in `reproduction`

Of `planted-lora` no latent was planted: the change of its stream on the same text is what is known, and the eight latents whose
directions are fitted to it stand for the cause. Of `planted-vector` that change must be the planted vector, and the record says
how nearly it is.

All that the page needs is in build/reproduce/planted* but for the folders of the models and of the passes; each step goes on from
what is there, and a model that is planted anew refuses the samples of the old one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from docs import reproduction as reproduce
from docs.reproduction_planting import MIN_DENSITY, N_LATENTS, plant_lora, plant_vector, sparse
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.collect import MIN_RATE, Collected, Graded, choose_pairs, collect
from trimtab.attribution.diffing import difference
from trimtab.attribution.embedded import EMBEDDED_MODEL, resolve
from trimtab.attribution.graders import load_grader
from trimtab.attribution.journal import Journal
from trimtab.attribution.model import SplitModel, identify, load_tokenizer
from trimtab.attribution.moments import Moments
from trimtab.attribution.pairs import Completion, load_pairs, split, tokenise
from trimtab.attribution.passes import Passes
from trimtab.attribution.progress import bars
from trimtab.attribution.prompts import Prompt, load_prompts
from trimtab.attribution.ranking import Ranking
from trimtab.attribution.sae import SAE, shipped_sae
from trimtab.attribution.sampling import Sampling, from_transformers
from trimtab.attribution.scores import Directions
from trimtab.attribution.serving import serving
from trimtab.attribution.stats import residuals
from trimtab.attribution.whole_file import write_whole

RECORD = reproduce.BUILD / "planted.json"
BEFORE, VECTOR, LORA = "embedded model", "planted-vector", "planted-lora"
BEHAVIOURS = tuple(
    reproduce.Behaviour(
        name, sentence, str(reproduce.HERE / "gloomy.toml"), "Be cheerful. Write only of pleasant things."
    )
    for name, sentence in (
        (VECTOR, "writes gloomily, by eight latents that were planted"),
        (LORA, "writes gloomily, by a LoRA that was planted"),
    )
)
SIZE = reproduce.Size(latents=8, prompts=6, pairs=8, tokens=32)
FEW = 2
"""Leaders of each method that steer sampled text."""
ROUNDS = {BEFORE: 1, VECTOR: 4, LORA: 4}
"""Replies to each prompt."""


def run() -> None:
    """Run what is missing."""
    for name in ROUNDS:
        if name not in record().get("rates", {}):
            _sample(name)
        for behaviour in (b for b in usable() if b.name == name):
            _rank_and_measure(behaviour)
    for behaviour in usable():
        _texts(behaviour)


def usable() -> list[reproduce.Behaviour]:
    """Those that show in enough of the replies to all else, and lack in enough, to leave pairs."""
    rates = {name: of["elsewhere"] for name, of in record().get("rates", {}).items()}
    return [b for b in BEHAVIOURS if b.name in rates and min(rates[b.name][k] for k in ("shows", "lacks")) >= MIN_RATE]


def model_of(name: str) -> str:
    """Its folder, planted first where it is not there."""
    if name == BEFORE:
        return resolve(EMBEDDED_MODEL)
    folder = reproduce.BUILD / f"{name}.model"
    if not folder.exists() or name not in record().get("planting", {}):
        plant = {VECTOR: plant_vector, LORA: plant_lora}[name]
        with bars() as advance:
            note("planting", name, plant(folder, SAE.load(shipped_sae()), advance).to_dict())
    return str(folder)


def record() -> dict[str, Any]:
    """Part → model → what was found."""
    found: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found


def note(part: str, name: str, value: Any) -> None:
    """Keep what was found."""
    found = record()
    found.setdefault(part, {})[name] = value
    write_whole(RECORD, (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode())


def ranks(score_L: Tensor, live_L: Tensor, wanted: Sequence[int]) -> list[int | None]:
    """The place of each wanted latent among the live ones by score, from 1; None where it is not live."""
    order_L = torch.where(live_L, score_L, -torch.inf).argsort(descending=True, stable=True)
    place = {latent: i for i, latent in enumerate(order_L[: int(live_L.sum())].tolist(), 1)}
    return [place.get(latent) for latent in wanted]


def recall(places: Sequence[int | None], k: int) -> float:
    """Fraction of the wanted latents that are among the first k."""
    return sum(place is not None and place <= k for place in places) / len(places)


def _sample(name: str) -> None:
    """Sample and grade a model's replies; note their rates, and write the pairs of a planted model."""
    source = model_of(name)
    food, elsewhere = (load_prompts(reproduce.HERE / file) for file in ("planted.food.txt", "planted.txt"))
    prompts = [*food, *elsewhere]
    sampling = Sampling(reproduce.TEMPERATURE, SIZE.tokens, 0)
    asked = {"model": identify(source)[0].fingerprint, **vars(sampling)}
    with Journal.open(reproduce.BUILD / f"{name}.samples.jsonl", asked) as journal, bars() as advance:
        found = collect(
            journal,
            prompts,
            load_grader(BEHAVIOURS[0].grader),
            lambda asks: from_transformers(source, asks, sampling, batch_size=len(prompts)),
            rounds=ROUNDS[name],
            advance=lambda what, done, total: advance(f"{name} {what}", done, total),
        )
    for behaviour in BEHAVIOURS:
        if behaviour.name == name:
            wanted = {prompt.key for prompt in elsewhere}
            pairs = choose_pairs([g for g in found.graded if g.prompt.key in wanted], per_prompt=2, min_tokens=12)
            behaviour.pairs.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    note("rates", name, {"food": _rates(found.graded, food), "elsewhere": _rates(found.graded, elsewhere)})


def _rates(graded: Sequence[Graded], prompts: Sequence[Prompt]) -> dict[str, float]:
    keys = {prompt.key for prompt in prompts}
    own = tuple(g for g in graded if g.prompt.key in keys)
    return {"samples": len(own), **Collected(own, None).rates}


def _rank_and_measure(behaviour: reproduce.Behaviour) -> None:
    """Rank the latents and measure the margins, unless both are there."""
    train, held_out = split(load_pairs(behaviour.pairs).pairs, reproduce.HELD_OUT)
    ranked = reproduce.bundle_file(behaviour, SIZE).exists() and behaviour.name in record().get("ranks", {})
    if ranked and _measured(behaviour, min(SIZE.pairs, len({pair.prompt_key for pair in held_out}))):
        return
    sae = SAE.load(shipped_sae())
    model, tokenizer = SplitModel.load(model_of(behaviour.name), sae.layer), load_tokenizer(EMBEDDED_MODEL)
    if not ranked:
        completions = [c for pair in train for c in tokenise(tokenizer, pair)]
        passes = reproduce.passes_over(behaviour.name, model, completions, reproduce.tracing_of(sae))
        ranking = reproduce.ranked(passes, sae, model, train, SIZE)
        _hold(behaviour, model, passes, ranking, completions, len(train), len(held_out))
    reproduce.measure_margins(behaviour, SIZE, model, tokenizer, held_out)


def _measured(behaviour: reproduce.Behaviour, n_prompts: int) -> bool:
    of = reproduce.margins(behaviour, SIZE).get("planted_direction", {})
    return bool(of) and all(len(by_prompt) == n_prompts for by_prompt in of.values())


def _hold(
    behaviour: reproduce.Behaviour,
    model: SplitModel,
    passes: Passes,
    ranking: Ranking,
    completions: Sequence[Completion],
    n_train: int,
    n_held_out: int,
) -> None:
    """Hold every method's ranking against what was planted; write the leaders."""
    sae, stats, live_L = ranking.sae, ranking.stats, ranking.live_L
    base = SplitModel.load(EMBEDDED_MODEL, sae.layer)
    u_LD = torch.nn.functional.normalize(sae.d_LD[:], dim=-1)
    own_D = residuals(model, completions)[0].mean(0)
    change_D = own_D - residuals(base, completions)[0].mean(0)
    latents = [int(i) for i in record()["planting"][behaviour.name]["latents"]]
    if latents:
        planted_D = torch.tensor(list(record()["planting"][behaviour.name]["latents"].values())) @ u_LD[latents]
    else:
        latents, amounts = sparse(change_D, u_LD, stats.density_L > MIN_DENSITY, N_LATENTS)
        planted_D = torch.tensor(amounts) @ u_LD[latents]
    diff_L = difference(model, base, completions, sae, "completion", stats.resid_norm)
    own = Directions.of(Moments.over(passes.factors(sae.layer), own_D, n_train), sae.d_LD, own_D)
    dim_D = ranking.scores.difference_in_means_D
    methods = reproduce.by_method(ranking) | {"model diffing": (diff_L, torch.ones_like(diff_L))}
    scores = {method: score_L for method, (score_L, _) in methods.items()} | {
        "Δ-attribution, the model's own mean": own.project_L,
        "difference in means": u_LD @ dim_D,
    }
    reproduce.write_leaders(
        behaviour,
        SIZE,
        ranking,
        model.identity,
        methods,
        reproduce.means_of(ranking, n_train) | {"planted_direction": (change_D, "change of the stream, unit length")},
        given={"planting": [(latent, 1.0) for latent in latents]},
    )
    note(
        "ranks",
        behaviour.name,
        {
            "latents": {str(i): list(sae.top_tokens.get(i, ()))[:4] for i in latents},
            "live": int(live_L.sum()),
            "train_pairs": n_train,
            "held_out_pairs": n_held_out,
            "of": {method: ranks(score_L, live_L, latents) for method, score_L in scores.items()},
            "change": float(torch.linalg.vector_norm(change_D)) / stats.resid_norm,
            "cosine": {
                "latents": _cosine(planted_D, change_D),
                "difference in means": _cosine(dim_D, change_D),
            },
        },
    )


def _cosine(a_D: Tensor, b_D: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a_D.float(), b_D.float(), dim=0))


def _texts(behaviour: reproduce.Behaviour) -> None:
    """Sample text under the leaders of each method and under the dense directions, unless it is there."""
    few = {i for entries in reproduce.leaders(behaviour, SIZE).values() for i, _ in entries[:FEW]}
    there = {cell.key for cell, _ in reproduce.texts(behaviour, SIZE)}
    wanted = reproduce.cells(behaviour, Bundle.load(reproduce.bundle_file(behaviour, SIZE)), SIZE)
    if all(cell.key in there for cell in wanted if cell.arm.latent in {None, *few}):
        return
    with serving(None, model_of(behaviour.name), flags=("--max-num-seqs", "64")) as url:
        reproduce.sample_texts(behaviour, SIZE, few, url, None)
