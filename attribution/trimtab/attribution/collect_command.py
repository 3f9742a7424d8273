"""`trimtab collect`: prompts in, a pair file out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.attribution.refusals import refusals
from trimtab.attribution.writable import check_writable

if TYPE_CHECKING:
    from trimtab.attribution.collect import Collected, Sampler
    from trimtab.attribution.sampling import Ask, Sample, Sampling

__all__ = ["collect"]


def collect(
    prompts: Annotated[Path, typer.Option(help="Text with a user message a line, or JSONL with prompt or messages.")],
    grader: Annotated[str, typer.Option(help="TOML file, or a Python function as module:function.")],
    out: Annotated[Path, typer.Option(help="Pair file to write.")],
    journal: Annotated[
        Path | None, typer.Option(help="Every sample and grade; continued when it exists.", show_default="beside --out")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="An endpoint that speaks the OpenAI API.", show_default="a server started for --model"),
    ] = None,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Sample with transformers, without a server.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="HF folder, hub id, the embedded model's name, or the name at --url.",
            show_default="the first at --url, else the embedded model",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every prompt.")] = 10,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 48,
    seed: int = 0,
    system: Annotated[str | None, typer.Option(help="System message before every chat prompt.")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Pairs kept for one prompt, at most.")] = 2,
    min_tokens: Annotated[int, typer.Option(min=1, help="Shorter completions make no pairs.")] = 8,
    parallel: Annotated[int, typer.Option(min=1, help="Requests in flight, or the batch of transformers.")] = 64,
    api_key: Annotated[str | None, typer.Option(envvar="TRIMTAB_API_KEY", help="Key of the endpoint.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rates as JSON.")] = False,
) -> None:
    """Sample each prompt many times, grade the completions, and keep prompts that got both kinds as pairs."""
    with refusals():
        from trimtab.attribution.collect import choose_pairs
        from trimtab.attribution.collect import collect as run
        from trimtab.attribution.errors import SelectionError, SettingsError
        from trimtab.attribution.graders import load_grader
        from trimtab.attribution.journal import Journal
        from trimtab.attribution.progress import bars
        from trimtab.attribution.prompts import load_prompts
        from trimtab.attribution.sampling import Sampling
        from trimtab.attribution.serving import first_model
        from trimtab.attribution.whole_file import write_whole

        if transformers and url is not None:
            raise SettingsError("--transformers samples here and --url elsewhere; give one of the two")
        check_writable(out)
        asked = load_prompts(prompts)
        judge = load_grader(grader)
        sampling = Sampling(temperature, max_tokens, seed, system)
        name = model or (EMBEDDED_MODEL if url is None else first_model(url, api_key))
        path = journal or out.with_suffix(".journal.jsonl")
        identity = {
            "model": name,
            "sampler": "transformers" if transformers else "endpoint",
            **vars(sampling),
        }
        with (
            Journal.open(path, identity) as kept,
            bars() as advance,
            _sampler(url, name, transformers, api_key, sampling, parallel) as sampler,
        ):
            found = run(kept, asked, judge, sampler, rounds=rounds, advance=advance)
        records = choose_pairs(found.graded, per_prompt=per_prompt, min_tokens=min_tokens)
        _say(found, records, judge.name, as_json)
        if not records:
            raise SelectionError(
                f"no prompt has both kinds of completion; {path} keeps the samples: raise --rounds, or give prompts on "
                "which the behaviour comes and goes"
            )
        write_whole(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    if not as_json:
        Console(soft_wrap=True).print(f"{out}: {len(records)} pairs; samples and grades in {path}", highlight=False)


@contextmanager
def _sampler(
    url: str | None, model: str, transformers: bool, api_key: str | None, sampling: Sampling, parallel: int
) -> Iterator[Sampler]:
    """Where the samples come from; a server is started at the first sample that is missing, and stopped at the end."""
    from trimtab.attribution.embedded import resolve
    from trimtab.attribution.sampling import from_endpoint, from_transformers
    from trimtab.attribution.serving import client_of, serving

    with ExitStack() as stack:

        def sample(asks: Sequence[Ask]) -> Iterator[tuple[Ask, Sample]]:
            if transformers:
                return from_transformers(resolve(model), asks, sampling, batch_size=parallel)
            base = stack.enter_context(serving(url, model, flags=("--max-num-seqs", str(parallel))))
            client = stack.enter_context(client_of(base, api_key))
            return from_endpoint(client, model, asks, sampling, n_parallel=parallel)

        yield sample


def _say(found: Collected, records: list[dict[str, Any]], grader: str, as_json: bool) -> None:
    """The base rates, and what they mean for the pairs."""
    from trimtab.attribution.collect import MIN_RATE

    n_prompts = len({json.dumps(r.get("messages", r.get("prompt"))) for r in records})
    summary = {
        "samples": len(found.graded),
        "rates": {kind: round(rate, 4) for kind, rate in found.rates.items()},
        "no_verdict": found.n_unread,
        "usd": found.usd,
        "pairs": len(records),
        "prompts_with_pairs": n_prompts,
    }
    if as_json:
        typer.echo(json.dumps(summary))
        return
    console = Console(soft_wrap=True, highlight=False)
    rates = ", ".join(f"{kind} {rate:.1%}" for kind, rate in found.rates.items())
    console.print(f"{len(found.graded)} samples, graded by {grader}: {rates}", markup=False)
    for kind, verb in (("shows", "show"), ("lacks", "lack")):
        if found.rates[kind] < MIN_RATE:
            few = f"only {found.rates[kind]:.1%} of the samples {verb} the behaviour"
            console.print(f"{few}; below {MIN_RATE:.0%} of either kind pairs are few", markup=False)
    if found.n_unread:
        console.print(f"the judge gave no verdict on {found.n_unread} completions; they count as unclear", markup=False)
    if found.usd is not None:
        console.print(f"the judge cost {found.usd:.4f} USD", markup=False)
    console.print(f"{len(records)} pairs over {n_prompts} prompts", markup=False)
