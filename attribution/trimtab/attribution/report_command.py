"""`trimtab report`: what was found and measured, as one HTML file and the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trimtab.attribution.answer import AsJson, say
from trimtab.attribution.refusals import refusals
from trimtab.attribution.writable import check_writable

__all__ = ["report"]


def report(
    bundle: Annotated[Path, typer.Argument(help="Bundle to report on.")],
    trial: Annotated[Path | None, typer.Option(help="Result of `trimtab validate` on it.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Show where its latents fire in this pair file.")] = None,
    sae: Annotated[
        Path | None,
        typer.Option(help="Folder of the SAE, for its examples.", show_default="the shipped SAE, where it is that"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="HF folder or hub id.", show_default="the bundle's own")] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML to write; JSON goes beside it.", show_default="NAME.html")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a report that a person who was not there can read."""
    with refusals():
        from trimtab.attribution.bundle import Bundle
        from trimtab.attribution.report.document import document, evidence, read_trial
        from trimtab.attribution.report.page import page
        from trimtab.attribution.sae import shipped_sae
        from trimtab.attribution.sae_files import name_of
        from trimtab.attribution.whole_file import write_whole

        loaded = Bundle.load(bundle)
        out = out or Path(f"{bundle.name.split('.')[0]}.html")
        check_writable(out)
        result = read_trial(trial, loaded) if trial is not None else None
        if sae is None and loaded.header.sae.id == name_of(shipped_sae()):
            sae = shipped_sae()
        shown = evidence(loaded, model or loaded.header.model.id, sae, pairs)
        found = document(loaded, result, shown)
        data = json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
        write_whole(out.with_suffix(".json"), data.encode())
        write_whole(out, page(found).encode())
    beside = out.with_suffix(".json")
    say(f"{out} and {beside}", {"html": str(out), "json": str(beside)}, as_json=as_json)
