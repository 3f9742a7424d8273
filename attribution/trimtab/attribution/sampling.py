"""Pairs from a model's own samples: each prompt is sampled many times, the completions are graded, and prompts that got
both kinds become pairs.

    python -m trimtab.attribution.sampling --prompts FILE --samples-file FILE --out FILE

The samples file grows batch by batch and a run started again continues where it stopped; each batch has its own seed, so an
interrupted run ends with the same samples as one that was not.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from trimtab.attribution.embedded import EMBEDDED_MODEL, resolve
from trimtab.attribution.errors import SelectionError
from trimtab.attribution.graders import coherent, pretends_human

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Sample", "base_rates", "choose_pairs", "sample"]


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt."""

    prompt: str
    text: str
    n_tokens: int
    """Tokens sampled, end of turn included."""


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    rounds: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    batch_size: int,
    file: Path,
) -> list[Sample]:
    """`rounds` samples of every prompt, appended to `file` batch by batch; what `file` already holds is not sampled again."""
    work = [prompt for _ in range(rounds) for prompt in prompts]
    done = [Sample(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    done = done[: len(done) // batch_size * batch_size] if len(done) < len(work) else done
    if [s.prompt for s in done] != work[: len(done)]:
        raise SelectionError(f"{file} holds samples of other prompts; remove it, or name another file")
    batches = [work[i : i + batch_size] for i in range(len(done), len(work), batch_size)]
    file.write_text("".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in done))
    for i, batch in enumerate(track(batches, "sampling", console=Console(stderr=True)), len(done) // batch_size):
        with file.open("a") as f:
            for new in _batch(model, tokenizer, batch, temperature=temperature, max_tokens=max_tokens, seed=seed + i):
                f.write(json.dumps(asdict(new), ensure_ascii=False) + "\n")
                done.append(new)
    return done


def _batch(
    model: PreTrainedModel, tokenizer: Any, prompts: list[str], *, temperature: float, max_tokens: int, seed: int
) -> Iterator[Sample]:
    import torch

    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            **inputs,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    for prompt, ids in zip(prompts, out[:, inputs["input_ids"].shape[1] :], strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        yield Sample(prompt, text, int((ids != tokenizer.pad_token_id).sum()))


def base_rates(samples: list[Sample]) -> dict[str, float]:
    """Fraction of samples that show the behaviour, lack it, are unclear, or are incoherent (and graded no further)."""
    counts = Counter(pretends_human(s.text) if coherent(s.text) else "incoherent" for s in samples)
    return {verdict: counts[verdict] / len(samples) for verdict in ("shows", "lacks", "unclear", "incoherent")}


def choose_pairs(samples: list[Sample], *, per_prompt: int, min_tokens: int) -> list[dict[str, Any]]:
    """Records of a pair file: for each prompt the coherent completions of the two kinds that are closest in length."""
    kinds: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: {"shows": [], "lacks": [], "unclear": []})
    for s in samples:
        if coherent(s.text) and s.n_tokens >= min_tokens:
            kinds[s.prompt][pretends_human(s.text)].append(s)
    records: list[dict[str, Any]] = []
    for prompt, by_kind in kinds.items():
        shows, lacks = list(dict.fromkeys(by_kind["shows"])), list(dict.fromkeys(by_kind["lacks"]))
        for _ in range(min(per_prompt, len(shows), len(lacks))):
            positive, negative = min(
                ((p, n) for p in shows for n in lacks), key=lambda pair: abs(pair[0].n_tokens - pair[1].n_tokens)
            )
            shows.remove(positive)
            lacks.remove(negative)
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
            records.append(
                {
                    "id": f"{slug}.{sum(r['messages'][0]['content'] == prompt for r in records)}",
                    "messages": [{"role": "user", "content": prompt}],
                    "positive": positive.text,
                    "negative": negative.text,
                }
            )
    return records


def main(
    prompts: Annotated[Path, typer.Option(help="One prompt a line.")],
    out: Annotated[Path, typer.Option(help="Pair file to write.")],
    samples_file: Annotated[Path, typer.Option(help="Every sample, one JSON a line; continued when it exists.")],
    model: Annotated[str, typer.Option(help="HF folder, hub id, or the embedded model's name.")] = EMBEDDED_MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every prompt.")] = 10,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 32,
    per_prompt: Annotated[int, typer.Option(min=1, help="Pairs kept for one prompt.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1)] = 54,
    seed: int = 0,
) -> None:
    """Sample a model, grade the completions with `graders.pretends_human`, and write the pairs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve(model)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm.train(False)
    samples = sample(
        lm,
        AutoTokenizer.from_pretrained(folder),
        [line.strip() for line in prompts.read_text().splitlines() if line.strip()],
        rounds=rounds,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        batch_size=batch_size,
        file=samples_file,
    )
    records = choose_pairs(samples, per_prompt=per_prompt, min_tokens=max_tokens // 2)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    partial.replace(out)
    rates = ", ".join(f"{verdict} {rate:.1%}" for verdict, rate in base_rates(samples).items())
    n_prompts = len({record["messages"][0]["content"] for record in records})
    Console().print(f"{len(samples)} samples: {rates}; {len(records)} pairs over {n_prompts} prompts in {out}")


if __name__ == "__main__":
    typer.run(main)
