"""What attribution costs: `make bench-attribution` measures and writes docs/benchmarks-attribution.md.

Every ratio is of two things done in turns within this process, and is the median over the turns: a machine that does other things
slows both. Arithmetic is real: real shapes, random numbers where no model of that size is at hand; model and pairs ship.
The naive sum is the definition as one would write it: for each pass, both projections of every token on every unit direction,
multiplied and added up.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.attribution.gradients import Factors, Tracing, batches, trace
from trimtab.attribution.matrix import Stored
from trimtab.attribution.model import SplitModel, load_tokenizer, pad
from trimtab.attribution.moments import Moments
from trimtab.attribution.pairs import Completion, load_pairs, shipped_pairs, tokenise
from trimtab.attribution.sae import SAE, shipped_sae
from trimtab.attribution.scores import Directions

D, N_PAIRS, N_PASS = 576, 60, 512
WIDTHS = (8_192, 131_072, 2_097_152)
MODELS = (576, 1024, 2048, 4096)
OUT = Path("docs/benchmarks-attribution.md")


@dataclass
class Turns:
    """Seconds of several things that are done in turns."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def take(self, **what: Callable[[], Any]) -> None:
        """One turn of each."""
        for name, do in what.items():
            start = time.perf_counter()
            do()
            self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def median(self, name: str) -> float:
        """Median seconds of a turn."""
        return statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the turns of how much longer `slow` takes."""
        return statistics.median(s / f for s, f in zip(self.seconds[slow], self.seconds[fast], strict=True))


def anonymous_memory() -> int:
    """Bytes of this process's memory that are no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most memory in use within it, over what was in use before, bytes; in the list afterwards."""
    done, found, before = threading.Event(), [0], anonymous_memory()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], anonymous_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def random_pass(n: int, d: int, generator: torch.Generator) -> Factors:
    """One pass over n tokens of eight completions."""
    a, g = (torch.randn(n, d, generator=generator) for _ in range(2))
    return Factors(a, g, torch.arange(n) * 8 // n)


def decoder(n_latents: int, folder: Path, generator: torch.Generator) -> Stored:
    """Random unit directions in a mapped file of bf16, as a 2M-latent SAE lies on disk."""
    file = folder / f"decoder.{n_latents}"
    with file.open("wb") as out:
        for start in range(0, n_latents, 1 << 16):
            d = torch.randn(min(1 << 16, n_latents - start), D, generator=generator)
            d = torch.nn.functional.normalize(d, dim=1).bfloat16()
            out.write(d.view(torch.int16).numpy().tobytes())
    W = torch.from_file(str(file), size=n_latents * D, dtype=torch.bfloat16)
    return Stored(W.view(n_latents, D))


def naive(factors: Factors, u_LD: Tensor, mean_D: Tensor, total_L: Tensor) -> None:
    """−Σ_t (g_t · u)((a_t − ā) · u), added to `total_L`."""
    sign_N = (1 - 2 * (factors.of_N % 2)).float()[:, None]
    total_L -= ((sign_N * factors.g_ND) @ u_LD.T * ((factors.a_ND - mean_D) @ u_LD.T)).sum(0)


def accumulation(generator: torch.Generator) -> list[str]:
    """Per token: M against the naive sum, which takes 131,072 latents at a time, the same ones again and again beyond that."""
    lines = []
    mean_D = torch.randn(D, generator=generator)
    for n_latents in WIDTHS:
        n_tokens = N_PASS if n_latents < 1 << 20 else 64
        factors, few = random_pass(N_PASS, D, generator), random_pass(n_tokens, D, generator)
        u_KD = torch.nn.functional.normalize(torch.randn(min(n_latents, 131_072), D, generator=generator), dim=1)
        turns, total_K = Turns(), torch.zeros(len(u_KD))

        def naively(n: int = n_latents, few: Factors = few, u_KD: Tensor = u_KD, total_K: Tensor = total_K) -> None:
            for _ in range(0, n, len(u_KD)):
                naive(few, u_KD, mean_D, total_K)

        for _ in range(7 if n_latents < 1 << 20 else 3):
            turns.take(matrix=lambda f=factors: Moments.over([f] * 8, mean_D, 4), naive=naively)  # type: ignore[misc]
        mine, theirs = turns.median("matrix") / (8 * N_PASS), turns.median("naive") / n_tokens
        faster = turns.ratio("naive", "matrix") * 8 * N_PASS / n_tokens
        lines.append(f"| {n_latents:,} | {1e6 * mine:.1f} µs | {1e6 * theirs:,.0f} µs | **{faster:,.0f} ×** |")
    return lines


def scoring(real: list[Factors], mean_D: Tensor, stored: dict[int, Stored]) -> list[str]:
    """All scores of a 60-pair run from its passes: M, then every latent; against the naive sum."""
    lines = []
    for n_latents in WIDTHS[:2]:
        u_LD, turns = stored[n_latents][:], Turns()

        def mine(u_LD: Tensor = u_LD) -> None:
            Directions.of(Moments.over(real, mean_D, N_PAIRS), u_LD, mean_D)

        def naively(u_LD: Tensor = u_LD) -> None:
            total_L = torch.zeros(len(u_LD))
            for factors in real:
                naive(factors, u_LD, mean_D, total_L)

        for _ in range(3 if n_latents < 1 << 16 else 2):
            turns.take(mine=mine, naive=naively)
        with peak() as used:
            mine()
        with peak() as used_naively:
            naively()
        lines.append(
            f"| {n_latents:,} | {turns.median('mine'):.2f} s | {turns.median('naive'):.1f} s | "
            f"**{turns.ratio('naive', 'mine'):.0f} ×** | {used[0] / 1e6:.0f} MB | {used_naively[0] / 1e6:,.0f} MB |"
        )
    return lines


def products(generator: torch.Generator) -> list[str]:
    """The accumulation of eight passes of 1,024 tokens against the plain products of the same size."""
    lines = []
    for d in MODELS:
        factors, mean_D, turns = random_pass(1024, d, generator), torch.randn(d, generator=generator), Turns()
        for _ in range(5):
            turns.take(
                product=lambda f=factors: [f.g_ND.T @ f.a_ND for _ in range(8)],  # type: ignore[misc]
                matrix=lambda f=factors, mean=mean_D: Moments.over([f] * 8, mean, 4),  # type: ignore[misc]
            )
        lines.append(
            f"| {d:,} | {1e3 * turns.median('product'):.1f} ms | {1e3 * turns.median('matrix'):.1f} ms | "
            f"**{turns.ratio('product', 'matrix'):.0%}** | {12 * d * d / 1e6:.0f} MB |"
        )
    return lines


def wide(model: SplitModel, completions: list[Completion], tracing: Tracing, stored: Stored, mean_D: Tensor) -> str:
    """What scoring all latents of the widest SAE adds to the passes of a 60-pair run; a part of each in turns."""
    every, turns = list(batches(completions)), Turns()
    moments = Moments.over([trace(model, completions, every[0], tracing).factors[model.layer]], mean_D, N_PAIRS)
    size = -(-len(stored) // len(every))
    with peak() as used:
        for i, batch in enumerate(every):
            part = Stored(stored.W_LD[i * size : (i + 1) * size])
            turns.take(
                passes=lambda b=batch: trace(model, completions, b, tracing),  # type: ignore[misc]
                scores=lambda p=part: Directions.of(moments, p, mean_D),  # type: ignore[misc]
            )
    passes, scores = (sum(turns.seconds[name]) for name in ("passes", "scores"))
    return (
        f"The passes over {N_PAIRS} pairs took {passes:.0f} s; scoring all {len(stored):,} latents of a decoder mapped from disk "
        f"took {scores:.1f} s: **{scores / passes:.0%}** more. Peak of both together, beside the model and mapped pages: "
        f"{used[0] / 1e6:,.0f} MB."
    )


def against_forward(model: SplitModel, completions: list[Completion], tracing: Tracing) -> str:
    """A completion's forward and backward against one plain forward of the whole model."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    whole.requires_grad_(False).train(False)
    turns, chosen = Turns(), completions[:24]

    def plain(i: int) -> None:
        with torch.no_grad():
            whole(input_ids=pad([chosen[i]]), use_cache=False)

    for i in range(len(chosen)):
        turns.take(
            plain=lambda i=i: plain(i),  # type: ignore[misc]
            attribution=lambda i=i: trace(model, chosen, [i], tracing),  # type: ignore[misc]
        )
    return (
        f"Attribution of one completion took {turns.median('attribution'):.2f} s and a plain forward of it "
        f"{turns.median('plain'):.2f} s (medians over {len(chosen)} completions, one at a time, "
        f"{statistics.mean(len(c.ids) for c in chosen):.0f} tokens on average): "
        f"**{turns.ratio('attribution', 'plain'):.2f} ×**."
    )


def main() -> None:
    """Measure and write."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE.load(shipped_sae())
    assert sae.stats is not None
    mean_D, tracing = sae.stats.mean_D, Tracing("completion", {sae.layer: sae.stats.resid_norm})
    model, tokenizer = SplitModel.load(EMBEDDED_MODEL, sae.layer), load_tokenizer(EMBEDDED_MODEL)
    pairs = load_pairs(shipped_pairs()).pairs[:N_PAIRS]
    completions = [c for pair in pairs for c in tokenise(tokenizer, pair)]
    console = Console(stderr=True, highlight=False)
    forward = against_forward(model, completions, tracing)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRIMTAB_CACHE")) as folder:
        stored = {n: decoder(n, Path(folder), generator) for n in WIDTHS}
        run = wide(model, completions, tracing, stored[WIDTHS[-1]], mean_D)
        real = [trace(model, completions, batch, tracing).factors[sae.layer] for batch in batches(completions)]
        n_tokens = sum(len(factors.of_N) for factors in real)
        console.print(forward, run, sep="\n")
        tables = accumulation(generator), scoring(real, mean_D, stored), products(generator)
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}"
    OUT.write_text(
        f"""# What attribution costs

Written by `make bench-attribution`: {machine}, fp32, no GPU. Ratios are medians of
things done in turns in one process; the seconds are those of a machine that did other things too. The naive sum is the
definition: each token projected on each latent's unit direction, twice. Left out: loading, and the interventions.

## One more token

Accumulating M = Σ g(a − ā)ᵀ against the naive sum, d_model {D}:

| latents | M, per token | naive, per token | faster |
|---|---|---|---|
{chr(10).join(tables[0])}

## All scores of a run

From the passes over {N_PAIRS} pairs of the shipped behaviour ({n_tokens:,} tokens kept) to every latent's score by projection;
memory beside the decoder itself:

| latents | M and dᵀMd | naive | faster | peak | peak, naive |
|---|---|---|---|---|---|
{chr(10).join(tables[1])}

{run}

## A wider model

Accumulating 8,192 tokens into M, 1,024 at a time, against the plain products of the same matrices; memory is M in fp64 and the
products in fp32:

| d_model | product | accumulation | of the product's speed | memory |
|---|---|---|---|---|
{chr(10).join(tables[2])}

## Against a plain forward

{forward}
"""
    )


if __name__ == "__main__":
    main()
