"""A steering sweep through the server, beside the same sweep by transformers hooks: same greedy answers, what each took, and why.

    python -m tests.bench.sweep [--latents 8] [--prompts 8] [--tokens 32] [--context 200]

Each of the latents is added at each strength to the completion of each prompt. The server gets all of it as one batch, as
`trimtab validate` sends it, once with the prefix cache and once without; transformers takes one latent and strength after the
other, all prompts in a batch, which is how such sweeps are usually written. CPU seconds are the kernel's account of all processes
of each side; on a busy machine they say more than the clock.
"""

import argparse
import json
import os
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

from tests.bench.engines import cpu_seconds
from trimtab.attribution.authored import Authored
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.attribution.hand_picked import hand_picked
from trimtab.attribution.in_flight import in_flight
from trimtab.attribution.pairs import load_pairs, shipped_pairs
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.trial.arms import arms_of
from trimtab.attribution.trial.cells import Cell, Sampled
from trimtab.attribution.trial.endpoint import Endpoint

OUT = Path("build/bench/sweep.json")
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)
LATENTS = (883, 6237, 6126, 1035, 6108, 7590, 4774, 123, 1693, 7682)


class Took(NamedTuple):
    """One side's sweep."""

    texts: list[str]
    seconds: float
    cpu: float
    prefilled: int
    """Prompt tokens that were computed."""


def main() -> int:
    """Runs both sides, prints the comparison, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=200, help="about how many tokens come before each question")
    parser.add_argument("--parallel", type=int, default=64)
    args = parser.parse_args()
    edit = Authored.of("add", 0.1, "max_act", "completion")
    latents = ",".join(map(str, LATENTS[: args.latents]))
    bundle = hand_picked(latents, sae=None, model=EMBEDDED_MODEL, name="sweep", behaviour="a sweep", edit=edit)
    prompts = _prompts(args.prompts, args.context)
    arms = [arm for arm in arms_of(bundle) if arm.latent is not None]
    cells = [Cell(arm, strength, prompt, 0, True) for arm in arms for strength in STRENGTHS for prompt in prompts]
    sampled = Sampled(0.0, args.tokens)
    found = {
        "server": _through_server(bundle, cells, sampled, args.parallel, ["--enable-prefix-caching"]),
        "server, no prefix cache": _through_server(
            bundle, cells, sampled, args.parallel, ["--no-enable-prefix-caching"]
        ),
        "transformers": _through_transformers(bundle, cells, sampled, prompts),
    }
    ours, theirs = found["server"], found["transformers"]
    same = sum(a == b for a, b in zip(ours.texts, theirs.texts, strict=True))
    cached = sum(a == b for a, b in zip(ours.texts, found["server, no prefix cache"].texts, strict=True))
    summary: dict[str, Any] = {
        "cells": len(cells),
        "prompt_tokens": sum(_n_tokens(cell.prompt) for cell in cells),
        "same_greedy_answers": same,
        "same_with_and_without_prefix_cache": cached,
        "load_average": os.getloadavg(),
        "arguments": vars(args),
        **{name: {"seconds": t.seconds, "cpu": t.cpu, "prefilled": t.prefilled} for name, t in found.items()},
        "faster_by_clock": theirs.seconds / ours.seconds,
        "faster_by_cpu": theirs.cpu / ours.cpu,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(summary, indent=1) + "\n")
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    differ = [(c.key, a, b) for c, a, b in zip(cells, ours.texts, theirs.texts, strict=True) if a != b]
    for key, a, b in differ[:5]:
        sys.stdout.write(f"{key}\n  server       {a!r}\n  transformers {b!r}\n")
    return 0 if same == len(cells) else 1


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
    return Took([replies[c].text for c in cells], seconds, cpu, prompt_tokens)


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
        while "serving " not in (text := log.read_text(errors="replace")):
            if process.poll() is not None:
                raise SystemExit(f"the server did not start; see {log}")
            time.sleep(0.2)
        yield "http://" + text.split(" on http://")[1].split()[0], process.pid
    finally:
        process.terminate()
        process.wait()


def _through_transformers(bundle: Bundle, cells: list[Cell], sampled: Sampled, prompts: list[Prompt]) -> Took:
    """One latent and strength after the other; the last position of each forward pass is the one that is edited."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).train(False)
    tokenizer = _tokenizer()
    ids = [_templated(prompt) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    texts: dict[str, str] = {}
    mine, start = time.process_time(), time.monotonic()
    for arm, strength in dict.fromkeys((cell.arm, cell.strength) for cell in cells):
        row = bundle.row_of[arm.latent or 0]
        amount = 0.1 * bundle.header.latents[row].max_activation * strength
        added_D = amount * torch.from_numpy(bundle.decoder[row])

        def add(_: Any, __: Any, output: Any, added_D: torch.Tensor = added_D) -> Any:
            h_BTD = output[0] if isinstance(output, tuple) else output
            h_BTD[:, -1] += added_D
            return output

        handle = model.model.layers[bundle.header.layer].register_forward_hook(add)
        with torch.inference_mode():
            out = model.generate(
                **batch, do_sample=False, max_new_tokens=sampled.max_tokens, pad_token_id=tokenizer.pad_token_id
            )
        handle.remove()
        for prompt, new in zip(prompts, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            kept = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
            texts[Cell(arm, strength, prompt, 0, True).key] = tokenizer.decode(kept, skip_special_tokens=True)
    seconds, cpu = time.monotonic() - start, time.process_time() - mine
    n_sweeps = len(cells) // len(prompts)
    return Took([texts[cell.key] for cell in cells], seconds, cpu, n_sweeps * batch["input_ids"].numel())


if __name__ == "__main__":
    sys.exit(main())
