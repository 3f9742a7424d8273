"""`trimtab bundle build | show | diff | verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trimtab.attribution.answer import AsJson, say
from trimtab.attribution.commands import bundle
from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.attribution.refusals import refusals
from trimtab.attribution.writable import check_writable

__all__ = ["bundle"]

DIFFERENT = 1


@bundle.command()
def build(
    latents: Annotated[str, typer.Option(help="Indices in the SAE, separated by commas.")],
    behaviour: Annotated[str, typer.Option(help="What the edits work against, in one sentence.")],
    out: Annotated[Path, typer.Option(help="Bundle to write.")],
    sae: Annotated[
        str | None, typer.Option(help="Folder, file or hub id of an SAE.", show_default="the shipped SAE")
    ] = None,
    model: Annotated[str, typer.Option(help="HF folder, hub id, or the embedded model's name.")] = EMBEDDED_MODEL,
    name: Annotated[str | None, typer.Option(help="Name of the bundle.", show_default="from the file's name")] = None,
    operation: Annotated[Literal["ablate", "scale", "clamp", "add", "project"], typer.Option()] = "add",
    amount: Annotated[
        float | None, typer.Option(help="add: amount; clamp: target; scale: factor.", show_default="0.1 max_act")
    ] = None,
    unit: Annotated[Literal["raw", "max_act"], typer.Option(help="Unit of the amount of add and clamp.")] = "raw",
    scope: Annotated[Literal["completion", "all"], typer.Option(help="Tokens that are edited.")] = "completion",
    as_json: AsJson = False,
) -> None:
    """Write a bundle of latents of your own choice; it holds no evidence until `trimtab validate` measures some."""
    with refusals():
        from trimtab.attribution.authored import Authored
        from trimtab.attribution.hand_picked import hand_picked

        check_writable(out)
        made = hand_picked(
            latents,
            sae=sae,
            model=model,
            name=name or out.name.split(".")[0],
            behaviour=behaviour,
            edit=Authored.of(operation, amount, unit, scope),
        )
        made.save(out)
    say(f"{out}: {made.content_hash}", {"file": str(out), "content_hash": made.content_hash}, as_json=as_json)


@bundle.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A bundle.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Print what differs between two bundles; exit code 1 if anything does."""
    with refusals():
        from trimtab.attribution.bundle import Bundle
        from trimtab.attribution.bundle_diff import differences

        found = differences(Bundle.load(first), Bundle.load(second))
    line = "\n".join(found) or "the same bundle, byte for byte"
    say(line, {"same": not found, "differences": found}, as_json=as_json)
    if found:
        raise typer.Exit(DIFFERENT)


@bundle.command()
def verify(
    file: Annotated[Path, typer.Argument(help="Bundle to verify.")],
    model: Annotated[str | None, typer.Option(help="It was made for exactly this model.")] = None,
    sae: Annotated[str | None, typer.Option(help="Its rows are exactly those of this SAE.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle's bytes against its content hash, and, if named, against the model and the SAE."""
    with refusals():
        from trimtab.attribution.bundle import Bundle
        from trimtab.attribution.bundle_diff import check_rows

        loaded = Bundle.load(file)
        checked = ["content hash"]
        if model is not None:
            from trimtab.attribution.model import identify

            loaded.check_model(identify(model)[0])
            checked.append(f"model {model}")
        if sae is not None:
            check_rows(loaded, sae)
            checked.append(f"SAE {sae}")
    document = {"file": str(file), "content_hash": loaded.content_hash, "checked": checked}
    say(f"{file}: {loaded.content_hash}; checked {', '.join(checked)}", document, as_json=as_json)
