"""The commands of this room: `trimtab attribute`, `trimtab model`, `trimtab bundle show`,
`trimtab sae convert`.

Torch and transformers are imported inside the commands, so that `trimtab --help` stays quick. A failure is one sentence on
stderr and exit code 2; nothing is left half-written.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.attribution.answer import AsJson, say
from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.attribution.refusals import refusals
from trimtab.attribution.writable import check_writable

if TYPE_CHECKING:
    from trimtab.attribution.bundle import Bundle
    from trimtab.attribution.run import Result

__all__ = ["attribute", "bundle", "model", "sae"]

BEHAVIOUR = "claims a human life (a childhood, a family, meals, feelings) instead of saying that it is software"

bundle = typer.Typer(no_args_is_help=True, help="Look into bundles.")
sae = typer.Typer(no_args_is_help=True, help="SAEs of other libraries.")


def attribute(
    out: Annotated[Path, typer.Option(help="Bundle to write.")] = Path("pretends-human.safetensors"),
    rival: Annotated[
        Path | None,
        typer.Option(
            help="Also write as many leaders by Δ-activation under the same edit, for `trimtab validate --against`."
        ),
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="JSONL pairs.", show_default="the shipped pairs")] = None,
    model: Annotated[str, typer.Option(help="HF folder, hub id, or the embedded model's name.")] = EMBEDDED_MODEL,
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder, file or hub id of an SAE; several for several hook points, a bundle each.",
            show_default="the shipped SAE",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle.", show_default="from the file's name")] = None,
    behaviour: Annotated[str | None, typer.Option(help="What the positive completions do, in one sentence.")] = None,
    operation: Annotated[
        Literal["ablate", "scale", "clamp", "add", "project"], typer.Option(help="Operation to score and recommend.")
    ] = "add",
    amount: Annotated[
        float | None,
        typer.Option(help="add: amount; clamp: target; scale: factor.", show_default="add, clamp: 0.1 max_act"),
    ] = None,
    unit: Annotated[Literal["raw", "max_act"], typer.Option(help="Unit of the amount of add and clamp.")] = "raw",
    scope: Annotated[
        Literal["completion", "all"], typer.Option(help="Tokens that are scored and edited.")
    ] = "completion",
    exclude_special: Annotated[
        bool, typer.Option("--exclude-special", help="Leave the tokenizer's special tokens alone.")
    ] = False,
    gradient: Annotated[
        Literal["plain", "relp", "integrated"],
        typer.Option(
            help="plain; relp: by RelP's linear rules; integrated: mean over the path to the mean activation."
        ),
    ] = "plain",
    diff_model: Annotated[
        str | None, typer.Option(help="Model that --model was fine-tuned from: scores by model diffing too.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=64, help="Latents in the bundle.")] = 10,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of the prompts that measure and do not find.")
    ] = 0.35,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch; bounds the memory.")] = 1024,
    allow_low_fidelity: Annotated[
        bool,
        typer.Option("--allow-low-fidelity", help="Write a bundle whose predictions do not hold, marked as failed."),
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the model; auto: bfloat16 on CUDA.")
    ] = "auto",
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Under torchrun, share out the model and not the data.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the bundle's header as JSON.")] = False,
) -> None:
    """Find the latents that cause a behaviour, intervene on each, and write them into a bundle."""
    with refusals():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from trimtab.attribution.errors import SettingsError
        from trimtab.attribution.pairs import shipped_pairs
        from trimtab.attribution.processes import Processes
        from trimtab.attribution.run import Settings
        from trimtab.attribution.run import attribute as run
        from trimtab.attribution.sae import shipped_sae

        if pairs is not None and behaviour is None:
            raise SettingsError("say in one sentence what the positive completions of your pairs do: --behaviour '…'")
        check_writable(out)
        if rival is not None:
            check_writable(rival)
        given = {
            "pairs": pairs,
            "model": model,
            "name": name,
            "behaviour": behaviour,
            "operation": operation,
            "amount": amount,
            "unit": unit,
            "scope": scope,
            "gradient": gradient,
            "diff-model": diff_model,
            "top": top,
            "held-out": held_out,
            "batch-tokens": batch_tokens,
            "dtype": dtype,
        }
        flags = {"exclude-special": exclude_special, "allow-low-fidelity": allow_low_fidelity}
        command = ["trimtab", "attribute", "--out", str(out)]
        command += [word for o, value in given.items() if value is not None for word in (f"--{o}", str(value))]
        command += [f"--{option}" for option, is_set in flags.items() if is_set]
        command += [word for source in sae or () for word in ("--sae", source)]
        work = out.with_name(out.name + ".run")
        settings = Settings(
            pairs=pairs or shipped_pairs(),
            saes=tuple(sae) if sae else (shipped_sae(),),
            model=model,
            name=name or out.name.split(".")[0],
            behaviour=behaviour or BEHAVIOUR,
            operation=operation,
            amount=amount,
            unit=unit,
            scope=scope,
            exclude_special=exclude_special,
            gradient=gradient,
            diff_model=diff_model,
            top=top,
            held_out=held_out,
            batch_tokens=batch_tokens,
            allow_low_fidelity=allow_low_fidelity,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
            work=work,
            command=shlex.join(command),
        )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Processes.joined(tensor_parallel=tensor_parallel) as processes:
            with Progress(*columns, console=Console(stderr=True), disable=not processes.first) as progress:
                results = run(settings, progress, processes)
            if not processes.first:
                return
            files = _files(out, [result.bundle for result in results])
            for file, result in zip(files, results, strict=True):
                result.bundle.save(file)
            if rival is not None:
                for file, result in zip(_files(rival, [r.rival for r in results]), results, strict=True):
                    result.rival.save(file)
            shutil.rmtree(work, ignore_errors=True)
    for file, result in zip(files, results, strict=True):
        _print_result(file, result, as_json)


def _files(out: Path, bundles: list[Bundle]) -> list[Path]:
    """Where the bundle of each hook point goes: `out`, or beside it with the layer in the name where there are several."""
    if len(bundles) == 1:
        return [out]
    return [out.with_name(f"{out.stem}.layer{b.header.layer}{out.suffix}") for b in bundles]


def _print_result(file: Path, result: Result, as_json: bool) -> None:
    if as_json:
        _print_json(result.bundle)
        return
    console = _console()
    console.print(_table(result.bundle))
    _print_controls(console, result)
    _print_fidelity(console, result)
    console.print(f"{file}: {result.bundle.content_hash}", soft_wrap=True)


def model(as_json: AsJson = False) -> None:
    """Print the folder of the embedded model, converting it the first time."""
    with refusals():
        folder = str(model_path())
    say(folder, {"folder": folder}, as_json=as_json)


@sae.command("convert")
def convert_sae(
    source: Annotated[str, typer.Argument(help="Folder, file or hub id of an SAE, pickles included.")],
    out: Annotated[Path, typer.Argument(help="SAELens folder to write.")],
    layer: Annotated[
        int | None, typer.Option(min=0, help="Block whose output it reads, where it does not say.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model it was trained on, for the record.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an SAE as a SAELens folder: no pickle, what can be folded folded. Takes no more memory than a block of it."""
    with refusals():
        from trimtab.attribution.sae_convert import convert

        found = convert(source, out, layer=layer, model=model)
    n_latents, d_model = found.d_LD.shape
    line = f"{out}: {n_latents} latents of width {d_model}, output of block {found.layer}"
    document = {"folder": str(out), "n_latents": n_latents, "d_model": d_model, "layer": found.layer}
    say("\n  ".join([line, *found.notes]), {**document, "notes": list(found.notes)}, as_json=as_json)


@bundle.command()
def show(
    file: Annotated[Path, typer.Argument(help="Bundle to read.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the header as JSON.")] = False,
) -> None:
    """Print what a bundle holds."""
    with refusals():
        from trimtab.attribution.bundle import Bundle

        loaded = Bundle.load(file)
    if as_json:
        _print_json(loaded)
        return
    header = loaded.header
    console = _console()
    console.print(f"[bold]{header.name}[/bold]: {header.behaviour}", highlight=False)
    console.print(
        f"{header.model.id} ({header.model.architecture}, d_model {header.model.d_model}), {header.hook_point}, "
        f"SAE {header.sae.id}; {header.created}",
        highlight=False,
    )
    console.print(_table(loaded))
    for edit in header.edits:
        target = f"latent {edit.latent}" if edit.latent is not None else f"vector {edit.vector}"
        amount = "" if edit.amount is None else f" {edit.amount:g} {edit.unit}"
        console.print(f"recommended: {edit.operation}{amount} {target}, {edit.scope} tokens", highlight=False)
    console.print(loaded.content_hash)


@bundle.callback()
@sae.callback()
def _group() -> None:
    """Keeps a sub-command one while it is the only one."""


def _console() -> Console:
    """Standard output; wide enough for the tables when it goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 132)


def _print_json(loaded: Bundle) -> None:
    typer.echo(
        json.dumps({**loaded.header.model_dump(mode="json"), "content_hash": loaded.content_hash}, ensure_ascii=False)
    )


def _table(loaded: Bundle) -> Table:
    table = Table(
        title=f"{loaded.header.name}: latents by attribution (nats per completion token)", title_justify="left"
    )
    for column in ("latent", "attribution", "by projection", "Δ-activation", "effect, held-out"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("top tokens")
    for record in loaded.header.latents:
        table.add_row(
            str(record.latent),
            _plus_minus(record.attribution, record.attribution_se),
            _plus_minus(record.attribution_project, None),
            _plus_minus(record.delta_activation, None),
            _plus_minus(record.effect, record.effect_se),
            escape(" ".join(repr(token)[1:-1] for token in record.top_tokens)),
        )
    return table


def _plus_minus(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:+.4f}" if error is None else f"{value:+.4f} ± {error:.4f}"


def _print_controls(console: Console, result: Result) -> None:
    effects = result.effects
    mean_random = sum(e.mean for e in effects.random) / len(effects.random)
    lines = [
        *((f"all of them together, strength {s:g}", e) for s, e in effects.together.items()),
        ("as many random live latents together", effects.random_together),
        ("as many leaders by Δ-activation together", effects.delta_activation),
        ("difference in means, subtracted", effects.difference_in_means),
    ]
    table = Table(title="change of the held-out margin (below 0: away from the behaviour)", title_justify="left")
    for column in ("edit", "margin", "loss of positives", "loss of negatives", "largest ‖Δ‖/‖h‖"):
        table.add_column(column, justify="left" if column == "edit" else "right", no_wrap=True)
    for label, e in lines:
        table.add_row(
            label, _plus_minus(e.mean, e.se), f"{e.positive:+.3f}", f"{e.negative:+.3f}", f"{e.max_relative_norm:.2f}"
        )
    table.add_row("one random live latent, mean", f"{mean_random:+.4f}", "", "", "")
    console.print(table)


def _print_fidelity(console: Console, result: Result) -> None:
    fidelity = result.measured.fidelity
    console.print(
        f"predicted against measured, {len(fidelity.points)} latents, leading and random: Pearson {fidelity.pearson:.2f}, "
        f"Spearman {fidelity.spearman:.2f}, same sign {fidelity.sign_agreement:.0%}, slope {fidelity.slope:.2f}"
        + ("" if fidelity.holds else "  [bold red]FAILED[/bold red]"),
        highlight=False,
    )
