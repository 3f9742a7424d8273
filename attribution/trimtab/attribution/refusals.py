"""How this room's commands end when they cannot go on: one sentence on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["refusals"]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what a caller can cause into one sentence and exit code 2."""
    from trimtab.attribution.bundle import BundleError
    from trimtab.attribution.embedded import EmbeddedModelError
    from trimtab.attribution.errors import AttributionError
    from trimtab.attribution.fingerprint import FingerprintError

    try:
        yield
    except (AttributionError, BundleError, EmbeddedModelError, FingerprintError) as e:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(e))}")
        raise typer.Exit(2) from e
