"""How the server's commands speak: tables for people, `--json` for programs, one sentence and exit code 2 for what went wrong."""

import getpass
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from trimtab.server.errors import TrimtabError

__all__ = ["REFUSED", "actor", "refusing", "say", "show", "tell"]

REFUSED = 2


def actor() -> str:
    """Who works at this terminal, for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli:unknown"


def say(line: str) -> None:
    """One line for people, on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"trimtab: {line}", markup=False)


def show(documents: Any, columns: Sequence[str], *, as_json: bool) -> None:
    """A document, or a list of them: as JSON, or as a table of these columns."""
    if as_json:
        sys.stdout.write(json.dumps(documents, indent=2) + "\n")
        return
    table = Table(*columns)
    for document in documents if isinstance(documents, list) else [documents]:
        table.add_row(*("" if document[column] is None else str(document[column]) for column in columns))
    Console(soft_wrap=True).print(table)


def tell(line: str, document: Any, *, as_json: bool) -> None:
    """What was done: one line for people, or the document for programs."""
    if as_json:
        show(document, (), as_json=True)
    else:
        say(line)


@contextmanager
def refusing() -> Iterator[None]:
    """An error of our own tree becomes a sentence and exit code 2."""
    try:
        yield
    except TrimtabError as e:
        say(str(e))
        raise typer.Exit(REFUSED) from None
