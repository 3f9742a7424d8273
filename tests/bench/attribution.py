"""What attribution costs: `make bench-attribution` measures and writes docs/benchmarks-attribution.md.

    python -m tests.bench.attribution [--quick]      quick: small sizes, and no page

Every ratio is of two things done in turns within this process, and is the median over the turns: a machine that does other
things slows both. Arithmetic is real: real shapes, random numbers where no model of that size is at hand; model and pairs ship.
The naive sum is the definition as one would write it: for each pass, both projections of every token on every unit direction,
multiplied and added up.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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

__all__ = ["judged", "machine"]

D, N_PASS = 576, 512
AT_ONCE = 131_072
"""Latents that the naive sum takes at a time."""
COLLECTED = 48
"""Tokens of a completion that `trimtab collect` samples, at most, where it is not told otherwise."""
OUT = Path("docs/benchmarks-attribution.md")
ACCUMULATED, SCORED, ADDED, PRODUCT, FORWARD, APART = 100.0, 30.0, 0.30, 0.70, 2.5, 1e-5
"""The bars, in the order of the page's first table."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


class Size(NamedTuple):
    """How much is measured."""

    n_pairs: int
    widths: tuple[int, int, int]
    """Latents; the last ones stay on disk."""
    models: tuple[int, ...]
    """d_model."""
    n_completions: int
    """Held against a plain forward."""


FULL = Size(60, (8_192, 131_072, 2_097_152), (576, 1024, 2048, 4096), 24)
QUICK = Size(4, (1_024, 8_192, 32_768), (576, 1024), 4)


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


class Table(NamedTuple):
    """Lines of a table of the page, and the figure that is held against a bar."""

    lines: list[str]
    figure: float


def accumulation(size: Size, generator: torch.Generator) -> Table:
    """Per token: M against the naive sum, which takes the same `AT_ONCE` latents again and again where there are more."""
    found = []
    mean_D = torch.randn(D, generator=generator)
    for n_latents in size.widths:
        n_tokens = N_PASS if n_latents < 1 << 20 else 64
        factors, few = random_pass(N_PASS, D, generator), random_pass(n_tokens, D, generator)
        u_KD = torch.nn.functional.normalize(torch.randn(min(n_latents, AT_ONCE), D, generator=generator), dim=1)
        turns, total_K = Turns(), torch.zeros(len(u_KD))

        def naively(n: int = n_latents, few: Factors = few, u_KD: Tensor = u_KD, total_K: Tensor = total_K) -> None:
            for _ in range(0, n, len(u_KD)):
                naive(few, u_KD, mean_D, total_K)

        for _ in range(7 if n_latents < 1 << 20 else 3):
            turns.take(matrix=lambda f=factors: Moments.over([f] * 8, mean_D, 4), naive=naively)  # type: ignore[misc]
        mine, theirs = turns.median("matrix") / (8 * N_PASS), turns.median("naive") / n_tokens
        faster = turns.ratio("naive", "matrix") * 8 * N_PASS / n_tokens
        found.append(
            (f"| {n_latents:,} | {1e6 * mine:.1f} µs | {1e6 * theirs:,.0f} µs | **{faster:,.0f} ×** |", faster)
        )
        console.print(found[-1][0], markup=False)
    return Table([line for line, _ in found], found[1][1])


class Scored(NamedTuple):
    """A run's passes, scored at one width."""

    line: str
    faster: float
    apart: float
    """Largest difference from the naive sum, of the largest score."""


def scored(name: str, passes: Sequence[Factors], n_pairs: int, mean_D: Tensor, u_LD: Tensor) -> Scored:
    """All scores of a run from its passes: M, then every latent; against the naive sum."""
    turns = Turns()

    def mine() -> Tensor:
        return Directions.of(Moments.over(passes, mean_D, n_pairs), u_LD, mean_D).project_L

    def naively() -> Tensor:
        total_L = torch.zeros(len(u_LD))
        for factors in passes:
            naive(factors, u_LD, mean_D, total_L)
        return total_L / n_pairs

    for _ in range(3):
        turns.take(mine=mine, naive=naively)
    with peak() as used:
        ours = mine()
    with peak() as used_naively:
        theirs = naively()
    faster, n_tokens = turns.ratio("naive", "mine"), sum(len(factors.of_N) for factors in passes)
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    line = (
        f"| {name} | {n_tokens:,} | {len(u_LD):,} | {turns.median('mine'):.2f} s | {turns.median('naive'):.1f} s | "
        f"**{faster:.0f} ×** | {apart:.0e} | {used[0] / 1e6:.0f} MB | {used_naively[0] / 1e6:,.0f} MB |"
    )
    console.print(line, markup=False)
    return Scored(line, faster, apart)


def products(size: Size, generator: torch.Generator) -> Table:
    """The accumulation of eight passes of 1,024 tokens against the plain products of the same size."""
    lines, share = [], 0.0
    for d in size.models:
        factors, mean_D, turns = random_pass(1024, d, generator), torch.randn(d, generator=generator), Turns()
        for _ in range(5):
            turns.take(
                product=lambda f=factors: [f.g_ND.T @ f.a_ND for _ in range(8)],  # type: ignore[misc]
                matrix=lambda f=factors, mean=mean_D: Moments.over([f] * 8, mean, 4),  # type: ignore[misc]
            )
        share = turns.ratio("product", "matrix")
        lines.append(
            f"| {d:,} | {1e3 * turns.median('product'):.1f} ms | {1e3 * turns.median('matrix'):.1f} ms | "
            f"**{share:.0%}** | {12 * d * d / 1e6:.0f} MB |"
        )
        console.print(lines[-1], markup=False)
    return Table(lines, share)


def wide(
    model: SplitModel, completions: list[Completion], tracing: Tracing, stored: Stored, mean_D: Tensor
) -> tuple[Table, list[Factors]]:
    """What scoring all latents of the widest SAE adds to the passes of a run, a part of each in turns; and the passes."""
    every, turns, passes = list(batches(completions)), Turns(), list[Factors]()
    n_pairs = len(completions) // 2
    moments = Moments.over([trace(model, completions, every[0], tracing).factors[model.layer]], mean_D, n_pairs)
    size = -(-len(stored) // len(every))

    def run(batch: list[int]) -> None:
        passes.append(trace(model, completions, batch, tracing).factors[model.layer])

    with peak() as used:
        for i, batch in enumerate(every):
            part = Stored(stored.W_LD[i * size : (i + 1) * size])
            turns.take(
                passes=lambda b=batch: run(b),  # type: ignore[misc]
                scores=lambda p=part: Directions.of(moments, p, mean_D),  # type: ignore[misc]
            )
    took, scores = (sum(turns.seconds[name]) for name in ("passes", "scores"))
    text = (
        f"The passes over {n_pairs} pairs took {took:.0f} s; scoring all {len(stored):,} latents of a decoder mapped from disk "
        f"took {scores:.1f} s: **{scores / took:.0%}** more. Peak of both together, beside the model and mapped pages: "
        f"{used[0] / 1e6:,.0f} MB."
    )
    console.print(text, markup=False)
    return Table([text], scores / took), passes


def against_forward(whole: Any, model: SplitModel, completions: list[Completion], tracing: Tracing, n: int) -> Table:
    """A completion's forward and backward against one plain forward of the whole model."""
    turns, chosen = Turns(), completions[:n]

    def plain(i: int) -> None:
        with torch.no_grad():
            whole(input_ids=pad([chosen[i]]), use_cache=False)

    for i in range(len(chosen)):
        turns.take(
            plain=lambda i=i: plain(i),  # type: ignore[misc]
            attribution=lambda i=i: trace(model, chosen, [i], tracing),  # type: ignore[misc]
        )
    ratio = turns.ratio("attribution", "plain")
    text = (
        f"Attribution of one completion took {turns.median('attribution'):.2f} s and a plain forward of it "
        f"{turns.median('plain'):.2f} s (medians over {len(chosen)} completions, one at a time, "
        f"{statistics.mean(len(c.ids) for c in chosen):.0f} tokens on average, the prompt's included): **{ratio:.2f} ×**."
    )
    console.print(text, markup=False)
    return Table([text], ratio)


def written_on(whole: Any, tokenizer: Any, completions: list[Completion]) -> list[Completion]:
    """The completions, which ship cut at 32 tokens, sampled on as `trimtab collect` does: to `COLLECTED` tokens or their end."""
    found = []
    torch.manual_seed(0)
    for start in range(0, len(completions), 30):
        batch = completions[start : start + 30]
        ids = tokenizer.pad({"input_ids": [list(c.ids) for c in batch]}, padding_side="left", return_tensors="pt")
        out = whole.generate(
            **ids,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            top_p=1.0,
            max_new_tokens=COLLECTED - min(c.n_completion for c in batch),
            pad_token_id=tokenizer.pad_token_id,
        )
        for c, more in zip(batch, out[:, ids["input_ids"].shape[1] :].tolist(), strict=True):
            kept = more[: COLLECTED - c.n_completion]
            end = kept.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in kept else len(kept)
            found.append(Completion((*c.ids, *kept[:end]), c.n_prompt))
    return found


def machine() -> str:
    """Commit, machine and versions as lines of a table."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    told = {
        "commit": f"`{commit.strip()}`",
        "machine": f"{cpu}, {os.cpu_count()} cores, no GPU; {platform.platform()}",
        "versions": f"PyTorch {torch.__version__} with {torch.get_num_threads()} thread(s), Python {platform.python_version()}",
        "load average at the end": ", ".join(f"{x:.1f}" for x in os.getloadavg()),
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in told.items())


def judged(shown: str, met: bool) -> str:
    """A figure, marked where it misses its bar."""
    return shown if met else f"{shown} ✗"


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, and no page")
    size = QUICK if parser.parse_args().quick else FULL
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    sae = SAE.load(shipped_sae())
    assert sae.stats is not None
    mean_D, tracing = sae.stats.mean_D, Tracing("completion", {sae.layer: sae.stats.resid_norm})
    model, tokenizer = SplitModel.load(EMBEDDED_MODEL, sae.layer), load_tokenizer(EMBEDDED_MODEL)
    whole: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    whole.requires_grad_(False).train(False)
    pairs = load_pairs(shipped_pairs()).pairs[: size.n_pairs]
    shipped = [c for pair in pairs for c in tokenise(tokenizer, pair)]
    collected = written_on(whole, tokenizer, shipped)
    forward = against_forward(whole, model, collected, tracing, size.n_completions)
    del whole
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRIMTAB_CACHE")) as folder:
        stored = {n: decoder(n, Path(folder), generator) for n in size.widths}
        added, passes = wide(model, collected, tracing, stored[size.widths[-1]], mean_D)
        short = [trace(model, shipped, batch, tracing).factors[sae.layer] for batch in batches(shipped)]
        runs = {f"completions of at most {COLLECTED} tokens": passes, "the same, cut at 32": short}
        scores = {
            (name, n): scored(name, run, size.n_pairs, mean_D, torch.nn.functional.normalize(stored[n][:], dim=1))
            for name, run in runs.items()
            for n in size.widths[:2]
        }
        tokens, wider = accumulation(size, generator), products(size, generator)
    faster = scores[next(iter(runs)), size.widths[1]].faster
    apart = max(found.apart for found in scores.values())
    middle, widest = (f"{n:,} latents" for n in size.widths[1:])
    bars = [
        (
            f"accumulation per token over the naive sum, {middle}",
            f"≥ {ACCUMULATED:g} ×",
            judged(f"{tokens.figure:,.0f} ×", tokens.figure >= ACCUMULATED),
        ),
        (
            f"scoring a run of {size.n_pairs} pairs over the naive sum, {middle}",
            f"≥ {SCORED:g} ×",
            judged(f"{faster:.0f} ×", faster >= SCORED),
        ),
        (
            f"scoring {widest}, of the run's passes",
            f"≤ {ADDED:.0%}",
            judged(f"{added.figure:.0%}", added.figure <= ADDED),
        ),
        (
            f"accumulation at d_model {size.models[-1]:,}, of a plain product's speed",
            f"≥ {PRODUCT:.0%}",
            judged(f"{wider.figure:.0%}", wider.figure >= PRODUCT),
        ),
        (
            "attribution of a completion, of a plain forward of it",
            f"≤ {FORWARD:g} ×",
            judged(f"{forward.figure:.2f} ×", forward.figure <= FORWARD),
        ),
        (
            "the quadratic form from the naive sum, of the largest score",
            f"≤ {APART:.0e}",
            judged(f"{apart:.0e}", apart <= APART),
        ),
    ]
    page = PAGE.format(
        machine=machine(),
        bars="\n".join(f"| {' | '.join(bar)} |" for bar in bars),
        d=D,
        tokens="\n".join(tokens.lines),
        n_pairs=size.n_pairs,
        collected=COLLECTED,
        scores="\n".join(found.line for found in scores.values()),
        wide=added.lines[0],
        products="\n".join(wider.lines),
        forward=forward.lines[0],
    )
    if size == FULL:
        OUT.write_text(page)
    sys.stdout.write(page)
    return 0


PAGE = """# What attribution costs

Written by `make bench-attribution`; do not edit. What validation costs is another page, by `make bench-sweep`.

{machine}

fp32. Ratios are medians of things done in turns in one process; where the machine did other things too, the seconds say so
and the ratios hardly. The naive sum is the definition: each token projected on each latent's unit direction, twice. Left
out: loading, and the interventions.

| | bar | measured |
|---|---|---:|
{bars}

✗ marks what misses its bar.

## One more token

Accumulating M = Σ g(a − ā)ᵀ against the naive sum, d_model {d}:

| latents | M, per token | naive, per token | faster |
|---:|---:|---:|---:|
{tokens}

## All scores of a run

From the passes over {n_pairs} pairs of the shipped behaviour to every latent's score by projection. The shipped
completions were cut at 32 tokens; here the model writes them on to {collected} or their end, which is what `trimtab
collect` does by itself. The last three columns: the largest difference between the two scores of a latent, of the largest
score; and the peak of memory beside the decoder's.

| pairs | tokens kept | latents | M and dᵀMd | naive | faster | apart | peak | peak, naive |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{scores}

With L latents and T kept tokens the naive sum takes 4 T L D operations, the quadratic form 2 T D² and then, by the
triangle that is M's symmetric half, 1.17 L D²: where there are many latents it wins by about 3.4 T / D. More pairs, or
longer ones, cost it next to nothing more.

{wide}

## A wider model

Accumulating 8,192 tokens into M, 1,024 at a time, against the plain products of the same matrices; memory is M in fp64 and the
products in fp32:

| d_model | product | accumulation | of the product's speed | memory |
|---:|---:|---:|---:|---:|
{products}

## Against a plain forward

{forward}
"""


if __name__ == "__main__":
    sys.exit(main())
