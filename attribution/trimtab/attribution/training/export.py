"""From the last checkpoint to the shipped folder: threshold, weights, statistics, measurements, card."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.attribution.training.cache import LEARNT, SINK_RATIO, LowerModel, read_shard
from trimtab.attribution.training.card import card
from trimtab.attribution.training.corpus import Document
from trimtab.attribution.training.documents import documents, samples_digest
from trimtab.attribution.training.evaluate import reconstruction, recovery
from trimtab.attribution.training.jumprelu import JumpReLU, calibrate, fold
from trimtab.attribution.training.latents import Latents
from trimtab.attribution.training.plan import HOOK_NAME, LAYER, DataPlan, TrainPlan, data_folder, train_folder
from trimtab.attribution.training.train import Run, Store

__all__ = ["export"]

_CALIBRATION_TOKENS = 20_480
_LATENT_SHARDS = 6
_MEASURED_TOKENS = 16_384
"""Most held-out tokens of a kind to measure reconstruction on."""
_SPLICED_TOKENS = 3_000


def export(data: DataPlan, plan: TrainPlan, folder: Path, note: str, progress: Progress) -> None:
    """Write `folder` and measure what was written."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cached = data_folder(data) / "activations"
    run = Run.load(train_folder(data, plan) / "checkpoint.pt")
    store = Store(cached)
    store.refresh()
    generator = torch.Generator().manual_seed(plan.seed)
    calibration = store.rows(torch.randperm(store.n_tokens, generator=generator)[:_CALIBRATION_TOKENS])
    threshold = calibrate(run, calibration, plan.k)
    fold(run, threshold).save(folder)
    sae = JumpReLU.load(folder)

    held = [read_shard(path) for path in sorted(cached.glob("held*-*.safetensors"))]
    learnt = sorted((path for name in LEARNT for path in cached.glob(f"{name}-*.safetensors")), reverse=True)
    task = progress.add_task("latents' statistics", total=len(held) + len(learnt[:_LATENT_SHARDS]))
    latents = Latents(sae)
    for shard in (*held, *(read_shard(path) for path in learnt[:_LATENT_SHARDS])):
        latents.add(shard)
        progress.update(task, advance=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path())
    latents.save(folder, tokenizer)

    chosen = documents(data)
    kinds = {"text": ("text",), "dialogue": ("dialogue",), "own replies": ("sample",), "chat": ("dialogue", "sample")}
    model: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    held_out, recovered = {}, {}
    tokens = _tokens_by_kind(cached)
    for name, members in kinds.items():
        h_TD = torch.cat([tokens[kind][:_MEASURED_TOKENS] for kind in members])
        task = progress.add_task(f"reconstruction: {name}", total=len(h_TD))
        held_out[name] = reconstruction(
            sae,
            h_TD,
            plan.k,
            lambda n, task=task: progress.update(task, advance=n),  # type: ignore[misc]
        ).asdict()
    for name in ("text", "dialogue", "own replies"):
        picked = _pick(chosen, kinds[name], _SPLICED_TOKENS)
        task = progress.add_task(f"spliced: {name}", total=len(picked))
        recovered[name] = recovery(
            sae, model, LAYER, picked, latents.mean, latents.median_norm,
            lambda n, task=task: progress.update(task, advance=n),  # type: ignore[misc]
        ).asdict()  # fmt: skip
    most_active = latents.chat_total.topk(20).indices
    metrics = {
        "model": EMBEDDED_MODEL,
        "hook_name": HOOK_NAME,
        "layer": LAYER,
        "sink_ratio": SINK_RATIO,
        "held_out": held_out,
        "recovery": recovered,
        "latents": {
            "n_tokens": latents.n_text + latents.n_chat,
            "n_sinks": latents.n_sinks,
            "never_fires": latents.never_fires,
            "median_norm": latents.median_norm,
            "most_active_on_chat": most_active.tolist(),
            "topped_by_sink": _topped_by_sink(sae, latents, most_active, chosen["heldout"]),
        },
        "training": {
            **vars(plan),
            "seen": run.seen,
            "note": note,
            "silent": float((run.silent_for > plan.silent_after).float().mean()),
            "threshold": float(sae.threshold[0]),
            "calibration_tokens": len(calibration),
        },
        "data": {
            **vars(data),
            "unique": int(run.drawn.sum()),
            "chat": store.n_chat / store.n_tokens,
            "sinks_dropped": store.n_sinks,
            "n_samples": len(chosen["samples"]) + len(chosen["heldsamples"]),
            "samples_sha256": samples_digest(data),
        },
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "README.md").write_text(card(metrics))


def _tokens_by_kind(cached: Path) -> dict[str, torch.Tensor]:
    """Held-out activations [T, D] of each kind of document."""
    found: dict[str, list[torch.Tensor]] = {}
    for path in sorted(cached.glob("held*-*.safetensors")):
        shard = read_shard(path)
        if path.name.startswith("heldsamples"):
            found.setdefault("sample", []).append(shard.h)
        else:
            found.setdefault("dialogue", []).append(shard.h[shard.chat])
            found.setdefault("text", []).append(shard.h[~shard.chat])
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def _pick(chosen: dict[str, list[Document]], kinds: tuple[str, ...], n_tokens: int) -> list[Document]:
    """Held-out documents of `kinds` in shuffled order, up to `n_tokens`."""
    pool = [d for name in ("heldout", "heldsamples") for d in chosen[name] if d.kind in kinds]
    random.Random(0).shuffle(pool)
    picked, total = [], 0
    for document in pool:
        if total >= n_tokens:
            break
        picked.append(document)
        total += len(document.tokens) - document.skip
    return picked


def _topped_by_sink(sae: JumpReLU, latents: Latents, which: torch.Tensor, held_out: list[Document]) -> int:
    """How many of the latents `which` have a sink as their strongest token when sinks are let in, as served they are."""
    model = LowerModel(str(model_path()), LAYER)
    chats = [document for document in held_out if document.kind != "text"][:32]
    topped = torch.zeros(len(which), dtype=torch.bool)
    for h_TD in model(chats):
        at_sink = h_TD.norm(dim=1) > SINK_RATIO * latents.median_norm
        at_sink[0] = True
        strongest = sae.encode(h_TD[at_sink])[:, which].max(0).values
        topped |= strongest > latents.max[which]
    return int(topped.sum())
