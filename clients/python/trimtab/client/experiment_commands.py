"""`trimtab experiment`: A/B tests of mitigations, from a terminal."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from trimtab.client import experiment_views as views
from trimtab.client.commands import AsJson, Key, Server, failures
from trimtab.client.definition_file import read_definition
from trimtab.client.experiments import OVER, Experiment
from trimtab.client.http import Trimtab

__all__ = ["experiment"]

experiment = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="A/B tests of mitigations in front of live traffic: create, ramp, watch, kill; results that are valid at every look.",
)
Which = Annotated[str, typer.Argument(metavar="KEY", help="The experiment's key.")]
Why = Annotated[str, typer.Option("--reason", help="Goes to the audit log.")]
Revision = Annotated[int | None, typer.Option(min=1, help="Refuse if somebody has changed it since this revision.")]
LOCAL = "http://127.0.0.1:8000"


@experiment.command()
def create(
    definition: Annotated[Path, typer.Argument(help="A .json, .toml or .yaml file.")],
    reason: Why,
    edit: Annotated[bool, typer.Option("--edit", help="Replace the draft of that key.")] = False,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write an experiment down, as a draft; `start` begins it."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        written = read_definition(definition)
        if edit:
            made = client.experiments.edit(str(written.get("key")), written, reason=reason)
        else:
            made = client.experiments.create(written, reason=reason)
        _done(made, as_json)


@experiment.command("list")
def list_all(
    state: Annotated[str | None, typer.Option(help="draft, running, paused, stopped, archived or purged.")] = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """All experiments."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        found = client.experiments.list(state=state)
        _show([_document(one) for one in found], views.list_view(found), as_json)


@experiment.command()
def show(key: Which, server: Server = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """How an experiment stands, and who changed what."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        found = client.experiments.get(key)
        _show(_document(found), views.history_view(found), as_json)


@experiment.command()
def start(
    key: Which,
    reason: Why,
    revision: Revision = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Enrol from now on, at the first step of the ramp."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.start(key, reason=reason, revision=revision), as_json)


@experiment.command()
def ramp(
    key: Which,
    coverage: Annotated[float, typer.Argument(min=0, max=1, help="The share of the units that take part.")],
    reason: Why,
    revision: Revision = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Another share of the units takes part; no unit changes its arm."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.ramp(key, coverage, reason=reason, revision=revision), as_json)


@experiment.command()
def approve(
    key: Which,
    reason: Why,
    revision: Revision = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let the next step of the ramp schedule be taken."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.approve(key, reason=reason, revision=revision), as_json)


@experiment.command()
def pause(
    key: Which,
    reason: Why,
    revision: Revision = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Enrol nobody until `resume`."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.pause(key, reason=reason, revision=revision), as_json)


@experiment.command()
def resume(
    key: Which,
    reason: Why,
    revision: Revision = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Go on after a pause."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.resume(key, reason=reason, revision=revision), as_json)


@experiment.command()
def stop(
    key: Which,
    reason: Why,
    revision: Revision = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """End it; requests that run finish as they began."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.stop(key, reason=reason, revision=revision), as_json)


@experiment.command()
def kill(key: Which, reason: Why, server: Server = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """End it on every replica at once; requests of it that run end with an error."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.kill(key, reason=reason), as_json)


@experiment.command()
def archive(
    key: Which,
    reason: Why,
    revision: Revision = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Put it away; it can still be read."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.archive(key, reason=reason, revision=revision), as_json)


@experiment.command()
def purge(
    key: Which,
    reason: Why,
    revision: Revision = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Delete what an archived experiment measured, for good; `report` and `export` it before."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        _done(client.experiments.purge(key, reason=reason, revision=revision), as_json)


@experiment.command()
def health(key: Which, server: Server = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Whether what is measured can be trusted. Exits with 1 if not."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        found = client.experiments.health(key)
        _show(_plain(found), views.health_view(found), as_json)
    if not found.healthy:
        raise typer.Exit(1)


@experiment.command()
def results(
    key: Which,
    every_population: Annotated[
        bool, typer.Option("--all", help="Triggered and per protocol beside intent to treat.")
    ] = False,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What can be said now; look as often as you like."""
    with failures(), Trimtab(server, api_key=api_key) as client:
        found = client.experiments.results(key)
        _show(dict(found.document), views.results_view(found, every_population=every_population), as_json)


@experiment.command()
def watch(
    key: Which,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 5.0,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Results and health live, until the experiment is over or ^C. With --json, one object a look."""
    live = None if as_json else Live(console=Console(highlight=False), auto_refresh=False)
    with failures(), Trimtab(server, api_key=api_key) as client, live or nullcontext(), suppress(KeyboardInterrupt):
        while _look(client, key, live) not in OVER:
            time.sleep(every)


@experiment.command()
def report(
    key: Which,
    out: Annotated[
        Path | None, typer.Option(help="HTML to write; JSON goes beside it.", show_default="KEY.html")
    ] = None,
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write the results as one HTML file with plots, for people who were not there; needs trimtab[reports]."""
    from trimtab.client.experiment_report import document, page

    path = out or Path(f"{key}.html")
    beside = path.with_suffix(".json")
    with failures(), Trimtab(server, api_key=api_key) as client:
        routes = client.experiments
        found = document(routes.get(key), routes.health(key), routes.results(key), routes.looks(key))
        _write(path, page(found).encode())
        _write(beside, (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode())
    _wrote(f"{path} and {beside}", {"html": str(path), "json": str(beside)}, as_json)


@experiment.command()
def export(
    key: Which,
    what: Annotated[Literal["exposures", "outcomes", "texts"], typer.Argument(help="Which rows.")],
    out: Annotated[Path, typer.Option(help="A .csv, .jsonl or .parquet file; the last needs trimtab[reports].")],
    server: Server = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write every exposure, outcome or sampled text to a file. Units are keyed hashes; the audit log tells who read texts."""
    from trimtab.client.export import write

    with failures(), Trimtab(server, api_key=api_key) as client:
        routes = client.experiments
        rows = {"exposures": routes.exposures, "outcomes": routes.outcomes, "texts": routes.texts}[what]
        n = write(out, what, rows(key))
    _wrote(f"{n:,} {what} in {out}", {"file": str(out), "rows": n}, as_json)


def _look(client: Trimtab, key: str, live: Live | None) -> str:
    """Shows how an experiment stands now; returns its state."""
    results, health, at = client.experiments.results(key), client.experiments.health(key), datetime.now(UTC)
    if live is None:
        _print({"at": at.isoformat(), "results": dict(results.document), "health": _plain(health)})
    else:
        looks = client.experiments.looks(key)
        live.update(views.watch_view(results, health, looks, at=f"{at:%H:%M:%S} UTC"), refresh=True)
    return results.state


def _done(found: Experiment, as_json: bool) -> None:
    line = f"{found.key} is {found.state} at coverage {found.coverage:g}, revision {found.revision}"
    _show(_document(found), line, as_json)


def _show(document: Any, view: RenderableType, as_json: bool) -> None:
    if as_json:
        _print(document)
    else:
        Console(highlight=False).print(view)


def _wrote(line: str, document: Any, as_json: bool) -> None:
    if as_json:
        _print(document)
    else:
        Console(soft_wrap=True, highlight=False).print(line, markup=False)


def _print(document: Any) -> None:
    Console(soft_wrap=True, highlight=False).print(json.dumps(document, ensure_ascii=False), markup=False)


def _document(found: Experiment) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(found)
    if not found.history:
        del plain["history"]
    return plain


def _plain(value: Any) -> Any:
    """Dataclasses, mappings, tuples and times as JSON has them."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "items"):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror}") from e
