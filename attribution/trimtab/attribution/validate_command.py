"""`trimtab validate`: what a bundle's edits do to sampled text, measured on a server."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from trimtab.attribution.refusals import refusals
from trimtab.attribution.writable import check_writable

if TYPE_CHECKING:
    from trimtab.attribution.bundle import Bundle
    from trimtab.attribution.prompts import Prompt
    from trimtab.attribution.trial.run import Result

__all__ = ["validate"]


def validate(
    bundle: Annotated[Path, typer.Argument(help="Bundle whose latents are the candidates.")],
    grader: Annotated[str, typer.Option(help="TOML file, or a Python function as module:function.")],
    pairs: Annotated[
        Path | None, typer.Option(help="Pair file: its held-out prompts are asked, its held-out pairs give margins.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Ask these prompts instead of the pairs'.")] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="Prompts on which nothing should change.", show_default="twelve that ship")
    ] = None,
    strengths: Annotated[str, typer.Option(help="Of the recommended edits, both signs.")] = "-2,-1,1,2,4",
    seeds: Annotated[int, typer.Option(min=1, help="Replies per prompt, arm and strength.")] = 2,
    max_prompts: Annotated[int, typer.Option(min=2, help="Prompts that are asked, at most.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1)] = 48,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    against: Annotated[list[Path] | None, typer.Option(help="Rival bundle, tried as a whole; may be repeated.")] = None,
    system: Annotated[
        str | None, typer.Option(help="A system message that asks for the same: an arm of its own.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of prompts that attribution left out.")
    ] = 0.35,
    max_edits: Annotated[int, typer.Option(min=1, max=64, help="Edits to recommend, at most.")] = 8,
    url: Annotated[
        str | None, typer.Option(help="A Trimtab server.", show_default="one started for the bundle's model")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name at --url, or what to serve.", show_default="the first, or the bundle's")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="HF folder or hub id to tokenise --pairs with.",
            show_default="--model where that is a folder, else the bundle's model",
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Bundle with the evidence.", show_default="NAME.validated.safetensors")
    ] = None,
    result: Annotated[Path | None, typer.Option(help="The whole result, JSON.", show_default="beside --out")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Every reply; continued when it exists.", show_default="beside --out")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="TRIMTAB_API_KEY", help="Key of the server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Steer with every latent of a bundle, at several strengths, on one continuous batch; grade, and choose what to recommend."""
    with refusals():
        from trimtab.attribution.bundle import Bundle
        from trimtab.attribution.graders import load_grader
        from trimtab.attribution.journal import Journal
        from trimtab.attribution.progress import bars
        from trimtab.attribution.prompts import load_prompts
        from trimtab.attribution.serving import serving
        from trimtab.attribution.trial.cells import Sampled
        from trimtab.attribution.trial.doses import Limits
        from trimtab.attribution.trial.endpoint import Endpoint
        from trimtab.attribution.trial.run import Trial, run
        from trimtab.attribution.trial.validated import validated
        from trimtab.attribution.whole_file import write_whole

        loaded = Bundle.load(bundle)
        stem = bundle.name.split(".")[0]
        out = out or bundle.with_name(f"{stem}.validated.safetensors")
        result = result or out.with_suffix(".json")
        for file in (out, result):
            check_writable(file)
        judge = load_grader(grader)
        pair_prompts, tokens, digest = _held_out(pairs, held_out, loaded, tokenizer or _model_of(loaded, model))
        asked = load_prompts(prompts) if prompts is not None else pair_prompts
        trial = Trial(
            bundle=loaded,
            rivals=tuple(Bundle.load(path) for path in against or ()),
            prompts=tuple(_some(asked, max_prompts)),
            neutral=tuple(load_prompts(neutral or NEUTRAL)),
            pairs=tuple(pair for _, pair in tokens),
            pair_prompts=tuple(prompt for prompt, _ in tokens),
            strengths=_strengths(strengths),
            n_seeds=seeds,
            sampled=Sampled(temperature, max_tokens),
            system=system,
            limits=Limits(),
            max_edits=max_edits,
            n_parallel=parallel,
        )
        served = model or loaded.header.model.id
        flags = ("--max-num-seqs", str(parallel), "--enable-prompt-tokens-details")
        bundles = (loaded, *trial.rivals)
        with (
            Journal.open(journal or out.with_suffix(".journal.jsonl"), trial.journal_of(served)) as kept,
            serving(url, served, flags=flags) as base,
            Endpoint.open(base, model if url else served, api_key, bundles) as endpoint,
            bars() as advance,
        ):
            found = run(trial, kept, endpoint, judge, advance)
        grades = [o.grade for o in found.outcomes if o.grade is not None]
        usd = judge.usd(sum(g.input_tokens for g in grades), sum(g.output_tokens for g in grades))
        how = {
            "command": shlex.join(["trimtab", "validate", *map(str, sys.argv[2:])]),
            "grader": {"name": judge.name, "digest": judge.digest},
            "pairs": digest,
            "prompts": [prompt.text for prompt in trial.prompts],
            "neutral": len(trial.neutral),
            "strengths": list(trial.strengths),
            "seeds": seeds,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "system": system,
            "rivals": {rival.header.name: rival.content_hash for rival in trial.rivals},
        }
        document = found.document(how, usd)
        data = (json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()
        write_whole(result, data)
        summary = {"result": f"sha256:{hashlib.sha256(data).hexdigest()}", "failed": document["failed"], "asked": how}
        written = validated(found, summary)
        written.save(out)
    if as_json:
        typer.echo(data.decode(), nl=False)
        return
    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    console.print(_table(found))
    for line in document["failed"]:
        console.print(line, markup=False, soft_wrap=True)
    if usd is not None:
        console.print(f"the judge cost {usd:.4f} USD", markup=False)
    if found.choice is not None:
        console.print(f"recommended: {list(found.choice.latents)}; {found.choice.ended}", markup=False, soft_wrap=True)
    console.print(f"{out}: {written.content_hash}; the result is in {result}", markup=False, soft_wrap=True)


NEUTRAL = Path(__file__).parent / "pair_sets" / "neutral.prompts.txt"


def _model_of(bundle: Bundle, model: str | None) -> str:
    """Where the bundle's model is: it records a folder's name alone."""
    return model if model is not None and Path(model).is_dir() else bundle.header.model.id


def _held_out(
    pairs: Path | None, fraction: float, bundle: Bundle, model: str
) -> tuple[list[Prompt], list[tuple[str, Any]], str | None]:
    """(prompts, (prompt, tokenised pair) of each, digest) of the held-out side; nothing without a pair file.

    Raises:
        SettingsError: `model` has another tokenizer than the bundle's.
    """
    if pairs is None:
        return [], [], None
    from trimtab.attribution.embedded import resolve
    from trimtab.attribution.errors import SettingsError
    from trimtab.attribution.fingerprint import model_folder, tokenizer_digest
    from trimtab.attribution.model import load_tokenizer
    from trimtab.attribution.pairs import load_pairs, split, tokenise
    from trimtab.attribution.prompts import Prompt

    file = load_pairs(pairs)
    chosen = split(file.pairs, fraction)[1] if fraction < 1 else list(file.pairs)
    if tokenizer_digest(model_folder(resolve(model))) != bundle.header.model.tokenizer:
        raise SettingsError(
            f"{model} has another tokenizer than the model of bundle {bundle.header.name!r}; give its folder by --tokenizer"
        )
    tokenizer = load_tokenizer(model)
    prompts = {pair.prompt_key: Prompt(pair.prompt, pair.messages) for pair in chosen}
    return list(prompts.values()), [(pair.prompt_key, tokenise(tokenizer, pair)) for pair in chosen], file.digest


def _some(prompts: list[Prompt], n: int) -> list[Prompt]:
    """The first n by key: the same few whatever the order of the file.

    Raises:
        SettingsError: there are fewer than two, which tell nothing.
    """
    from trimtab.attribution.errors import SettingsError

    if len(prompts) < 2:
        raise SettingsError("a trial needs two prompts or more; give --prompts, or --pairs with more held-out prompts")
    return sorted(prompts, key=lambda prompt: prompt.key)[:n]


def _strengths(text: str) -> tuple[float, ...]:
    from trimtab.attribution.errors import SettingsError

    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as e:
        raise SettingsError(f"--strengths {text!r} are no numbers; write them as -1,1,2") from e
    if not found or not all(0 < abs(strength) <= 100 for strength in found):
        raise SettingsError(f"--strengths {text!r}: each lies in -100..100 and is not 0, which is tried anyway")
    return found


def _table(found: Result) -> Table:
    table = Table(
        title="change of the rate of the behaviour, in points (95 % interval over prompts)", title_justify="left"
    )
    for column in ("arm", "strength", "shows", "change", "q", "Δ nats", "repetition", "neutral", "safe"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for dose, q in zip(found.doses, found.q, strict=True):
        e = dose.effect
        moved = dose.arm != "unsteered"
        table.add_row(
            dose.arm,
            f"{dose.strength:g}" if dose.strength else "",
            f"{dose.shows:.0%}",
            f"{100 * e.mean:+.0f} [{100 * e.low:+.0f}, {100 * e.high:+.0f}]" if moved else "",
            f"{q:.2g}" if moved else "",
            f"{dose.nats.mean:+.2f}" if moved else "",
            f"{dose.repetition:+.2f}" if moved else "",
            f"{dose.neutral_changed:.0%} changed" if moved and dose.neutral_changed is not None else "",
            "yes" if dose.safe else "no",
        )
    return table
