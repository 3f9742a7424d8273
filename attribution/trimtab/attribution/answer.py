"""What this room's shorter commands say at their end: a sentence for people, or with --json an object for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["AsJson", "say"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def say(line: str, document: Mapping[str, Any], *, as_json: bool) -> None:
    """On standard output."""
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False))
    else:
        Console(soft_wrap=True).print(line, markup=False, highlight=False)
