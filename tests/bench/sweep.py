"""A steering sweep through the server, beside the same sweep by transformers hooks: same greedy answers, what each took, and why.

    python -m tests.bench.sweep [--latents 8] [--prompts 8] [--tokens 32] [--context 200] [--write]

Each of the latents is added at each strength to the completion of each prompt. The server gets all of it as one batch, as
`trimtab validate` sends it, once with the prefix cache and once without; transformers takes one latent and strength after the
other, all prompts in a batch, which is how such sweeps are usually written. CPU seconds are the kernel's account of all
processes of each side; on a busy machine they say more than the clock.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.attribution import judged, machine
from tests.bench.cores import cpu_seconds
from trimtab.attribution.authored import Authored
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.attribution.hand_picked import hand_picked
from trimtab.attribution.in_flight import in_flight
from trimtab.attribution.pairs import load_pairs, shipped_pairs
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.trial.arms import Arm, arms_of
from trimtab.attribution.trial.cells import Cell, Sampled
from trimtab.attribution.trial.endpoint import Endpoint

OUT = Path("build/bench/sweep.json")
PAGE = Path("docs/benchmarks-sweep.md")
SERVER, UNCACHED, TRANSFORMERS = "server", "server, no prefix cache", "transformers"
BAR = 1.5
TIE = 1e-3
"""Nats between the two best tokens, below which rounding decides."""
STOP_SECONDS = 90
THREADS = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)
LATENTS = (883, 6237, 6126, 1035, 6108, 7590, 4774, 123, 1693, 7682)


class Took(NamedTuple):
    """One side's sweep."""

    texts: list[str]
    ids: list[list[int]]
    seconds: float
    cpu: float
    prefilled: int
    """Prompt tokens that were computed."""


def main() -> int:
    """Runs both sides, prints the comparison, writes the JSON and, if asked to, the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=200, help="about how many tokens come before each question")
    parser.add_argument("--parallel", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks-sweep.md")
    args = parser.parse_args()
    edit = Authored.of("add", 0.1, "max_act", "completion")
    latents = ",".join(map(str, LATENTS[: args.latents]))
    bundle = hand_picked(latents, sae=None, model=EMBEDDED_MODEL, name="sweep", behaviour="a sweep", edit=edit)
    prompts = _prompts(args.prompts, args.context)
    arms = [arm for arm in arms_of(bundle) if arm.latent is not None]
    cells = [Cell(arm, strength, prompt, 0, True) for arm in arms for strength in STRENGTHS for prompt in prompts]
    sampled = Sampled(0.0, args.tokens)
    found = {
        SERVER: _through_server(bundle, cells, sampled, args.parallel, ["--enable-prefix-caching"]),
        UNCACHED: _through_server(bundle, cells, sampled, args.parallel, ["--no-enable-prefix-caching"]),
        TRANSFORMERS: _through_transformers(bundle, cells, sampled, prompts),
    }
    ours, theirs = found[SERVER], found[TRANSFORMERS]
    differ = [i for i, (a, b) in enumerate(zip(ours.texts, theirs.texts, strict=True)) if a != b]
    ties = [_tie(bundle, cells[i], ours.ids[i], theirs.ids[i]) for i in differ]
    cached = sum(a == b for a, b in zip(ours.texts, found[UNCACHED].texts, strict=True))
    summary: dict[str, Any] = {
        "cells": len(cells),
        "prompt_tokens": sum(_n_tokens(cell.prompt) for cell in cells),
        "same_greedy_answers": len(cells) - len(differ),
        "widest_tie": max(ties, default=0.0),
        "same_with_and_without_prefix_cache": cached,
        "load_average": os.getloadavg(),
        "arguments": vars(args),
        **{name: {"seconds": t.seconds, "cpu": t.cpu, "prefilled": t.prefilled} for name, t in found.items()},
        "faster_by_clock": theirs.seconds / ours.seconds,
        "faster_by_cpu": theirs.cpu / ours.cpu,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(summary, indent=1) + "\n")
    page = document(summary)
    if args.write:
        PAGE.write_text(page)
    sys.stdout.write(page)
    for i in differ[:5]:
        sys.stdout.write(f"{cells[i].key}\n  server       {ours.texts[i]!r}\n  transformers {theirs.texts[i]!r}\n")
    return 0 if _same(summary) else 1


def _same(found: dict[str, Any]) -> bool:
    """Whether both sides answer alike, or part where rounding decides."""
    return bool(found["same_greedy_answers"] == found["cells"] or found["widest_tie"] < TIE)


def document(found: dict[str, Any]) -> str:
    """The page."""
    asked, n = found["arguments"], found["cells"]
    ours, uncached, theirs = (found[name] for name in (SERVER, UNCACHED, TRANSFORMERS))
    threads = ", ".join(f"`{name}={os.environ[name]}`" for name in THREADS if name in os.environ) or "as they come"
    rows = [
        f"| {name} | {t['seconds']:.1f} s | {t['cpu']:.1f} s | {t['prefilled']:,} |"
        for name, t in ((SERVER, ours), (UNCACHED, uncached), (TRANSFORMERS, theirs))
    ]
    clock, cpu = found["faster_by_clock"], found["faster_by_cpu"]
    same, cached = f"{found['same_greedy_answers']} of {n}", found["same_with_and_without_prefix_cache"]
    if found["widest_tie"]:
        same += f"; the others part where the two best tokens are {found['widest_tie']:.0e} nats apart or less"
    return _PAGE.format(
        machine=machine(),
        threads=threads,
        n_latents=asked["latents"],
        n_strengths=len(STRENGTHS),
        n_prompts=asked["prompts"],
        n_tokens=asked["tokens"],
        parallel=asked["parallel"],
        n=n,
        prompt=found["prompt_tokens"] / n,
        same=judged(same, _same(found)),
        cached=judged(f"{cached} of {n}", cached == n),
        clock=judged(f"{clock:.1f} ×", clock >= BAR),
        cpu=f"{cpu:.1f} ×",
        bar=BAR,
        rows="\n".join(rows),
        shared=uncached["seconds"] / ours["seconds"],
        shared_cpu=uncached["cpu"] / ours["cpu"],
        batched=theirs["seconds"] / uncached["seconds"],
        batched_cpu=theirs["cpu"] / uncached["cpu"],
        prefilled=ours["prefilled"],
        prompt_tokens=found["prompt_tokens"],
        fewer=found["prompt_tokens"] / max(ours["prefilled"], 1),
        batches=asked["parallel"] / asked["prompts"],
    )


_PAGE = """# What validation costs

Written by `make bench-sweep`; do not edit.

{machine}

{n_latents} latents × {n_strengths} strengths × {n_prompts} prompts = {n} greedy replies of at most {n_tokens} tokens, each
after {prompt:.0f} tokens of prompt on average; SmolLM2-135M-Instruct in fp32; threads: {threads}. **server**: as `trimtab
validate` asks, all of it at once, {parallel} in flight, each with its own edit of the completion; Trimtab's proof of every
reply is checked. **transformers**: the same edits by a forward hook, one latent and strength after the other, all prompts
in a batch, which is how such sweeps are usually written. CPU seconds are the kernel's account of all processes of each
side: what a busy machine disturbs less.

| | bar | measured |
|---|---|---:|
| same greedy answers, server and transformers | all | {same} |
| same answers with the prefix cache and without | all | {cached} |
| faster than transformers, by the clock | ≥ {bar} × | {clock} |
| the same by CPU seconds | | {cpu} |

✗ marks what misses its bar.

| | seconds | CPU seconds | prompt tokens computed |
|---|---:|---:|---:|
{rows}

## Where it comes from

- **Each prompt once.** An edit of the completion leaves the prompt's cache blocks as they are for everybody, so all latents and
  strengths share one prefill of each whole block (128 tokens where vLLM is not told otherwise on a CPU, 16 on a GPU):
  {prefilled:,} prompt tokens were computed of {prompt_tokens:,}. That is {shared:.1f} × by
  the clock and {shared_cpu:.1f} × by CPU seconds over the same server without a prefix cache.
- **A batch that stays full.** Without the cache, the server computes the prompts as often as transformers does, and is
  {batched:.1f} × as fast ({batched_cpu:.1f} × by CPU seconds): {parallel} replies share a step instead of {n_prompts}, one
  that ends makes room for the next, and short prompts are not padded to the longest.

## On a GPU

Not measured; what follows from the arithmetic. A decoding step reads every weight once, whatever the size of the batch. On
a CPU it is bound by arithmetic soon, and {parallel} replies take several times as long as {n_prompts}; on a GPU they take
about as long, up to a few hundred. There the batch alone should approach the ratio of the two sizes, {batches:.0f} ×, and
more with a larger `--parallel`; and a step of transformers pays Python and a launch for every operation of every layer,
where vLLM replays a CUDA graph ([gpu.md](gpu.md)). Prompts are bound by arithmetic on both, so what the cache saves
stays: {fewer:.1f} × fewer tokens here, and more where blocks are smaller or prompts longer.
"""


def _prompts(n: int, context: int) -> list[Prompt]:
    """Questions of the shipped pairs, each after other questions and answers: a few-shot prompt."""
    pairs = load_pairs(shipped_pairs()).pairs
    shots = [turn for pair in pairs[40:] for turn in (pair.messages[0], ("assistant", pair.negative))]
    shots = shots[: 2 * max(0, round(context / 45))]
    questions = list(dict.fromkeys(pair.messages[0] for pair in pairs))
    return [Prompt(None, (*shots, question)) for question in questions[:n]]


def _n_tokens(prompt: Prompt) -> int:
    return len(_templated(prompt))


def _templated(prompt: Prompt) -> list[int]:
    text = _tokenizer().apply_chat_template(prompt.fields()["messages"], tokenize=False, add_generation_prompt=True)
    return list(_tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@cache
def _model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).train(False)


def _through_server(bundle: Bundle, cells: list[Cell], sampled: Sampled, parallel: int, flags: list[str]) -> Took:
    with (
        _server(["--max-num-seqs", str(parallel), "--enable-prompt-tokens-details", *flags]) as (url, pid),
        Endpoint.open(url, EMBEDDED_MODEL, None, [bundle]) as endpoint,
    ):
        endpoint.reply({"prompt": "Warm up.", "max_tokens": 4, "temperature": 0.0}, None)
        before, mine, start = cpu_seconds(pid), time.process_time(), time.monotonic()
        replies = dict(
            in_flight(
                sorted(cells, key=lambda c: c.prompt.key),
                lambda c: endpoint.reply(sampled.request(c), c.arm.steering(c.strength)),
                parallel,
            )
        )
        seconds = time.monotonic() - start
        cpu = cpu_seconds(pid) - before + time.process_time() - mine
    prompt_tokens = sum(len(replies[c].prompt_ids) - replies[c].cached_tokens for c in cells)
    texts, ids = [replies[c].text for c in cells], [replies[c].ids for c in cells]
    return Took(texts, ids, seconds, cpu, prompt_tokens)


@contextmanager
def _server(flags: list[str]) -> Iterator[tuple[str, int]]:
    """(URL, process id) of a server of its own."""
    trimtab = Path(sys.executable).with_name("trimtab")
    log = Path("build/bench/sweep.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(trimtab), "serve", EMBEDDED_MODEL, "--port", "0", "--allow-bundle-upload", "--", *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        while (found := re.search(r"serving \S+ on (http://\S+)", log.read_text(errors="replace"))) is None:
            if process.poll() is not None:
                raise SystemExit(f"the server did not start; see {log}")
            time.sleep(0.2)
        yield found[1], process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _through_transformers(bundle: Bundle, cells: list[Cell], sampled: Sampled, prompts: list[Prompt]) -> Took:
    """One latent and strength after the other; the last position of each forward pass is the one that is edited."""
    model, tokenizer = _model(), _tokenizer()
    ids = [_templated(prompt) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    replies: dict[str, list[int]] = {}
    mine, start = time.process_time(), time.monotonic()
    for arm, strength in dict.fromkeys((cell.arm, cell.strength) for cell in cells):
        with _adding(model, bundle, arm, strength, slice(-1, None)), torch.inference_mode():
            out = model.generate(
                **batch, do_sample=False, max_new_tokens=sampled.max_tokens, pad_token_id=tokenizer.pad_token_id
            )
        for prompt, new in zip(prompts, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            end = new.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in new else len(new)
            replies[Cell(arm, strength, prompt, 0, True).key] = new[:end]
    seconds, cpu = time.monotonic() - start, time.process_time() - mine
    texts = [tokenizer.decode(replies[cell.key], skip_special_tokens=True) for cell in cells]
    n_sweeps = len(cells) // len(prompts)
    return Took(texts, [replies[cell.key] for cell in cells], seconds, cpu, n_sweeps * batch["input_ids"].numel())


@contextmanager
def _adding(model: Any, bundle: Bundle, arm: Arm, strength: float, where: slice) -> Iterator[None]:
    """Within it, the arm's latent is added at these positions of each forward pass."""
    row = bundle.row_of[arm.latent or 0]
    amount = 0.1 * bundle.header.latents[row].max_activation * strength
    added_D = amount * torch.from_numpy(bundle.decoder[row])

    def add(_: Any, __: Any, output: Any) -> Any:
        h_BTD = output[0] if isinstance(output, tuple) else output
        h_BTD[:, where] += added_D
        return output

    handle = model.model.layers[bundle.header.layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _tie(bundle: Bundle, cell: Cell, ours: list[int], theirs: list[int]) -> float:
    """How far apart the two best tokens are, where two replies to a cell part; nats, by transformers."""
    n = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    prompt = _templated(cell.prompt)
    with _adding(_model(), bundle, cell.arm, cell.strength, slice(len(prompt) - 1, None)), torch.inference_mode():
        best = _model()(torch.tensor([[*prompt, *ours[:n]]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


if __name__ == "__main__":
    sys.exit(main())
