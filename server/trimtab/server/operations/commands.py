"""`trimtab config show` and `trimtab doctor`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from trimtab.server.console import REFUSED, refusing, show
from trimtab.server.operations.doctor import examine
from trimtab.server.settings import Settings, load

__all__ = ["config", "doctor"]

ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="TRIMTAB_CONFIG", help="A TOML file of settings.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

config = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Settings: what they are, and where each came from."
)


@config.callback()
def _group() -> None:
    pass


@config.command("show")
def show_settings(file: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show every setting, its value, and where it came from: environment, file or default; flags come on top."""
    with refusing():
        loaded = load({}, config=file)
        rows = [
            {
                "setting": name,
                "value": _shown(name, getattr(loaded.settings, name)),
                "from": loaded.sources[name],
                "about": field.description,
            }
            for name, field in Settings.model_fields.items()
        ]
        if not as_json:
            rows = [{**row, "value": json.dumps(row["value"])} for row in rows]
        show(rows, ("setting", "value", "from", "about"), as_json=as_json)


def doctor(file: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Say what keeps a server from starting or steering here; exit code 2 if something does."""
    with refusing():
        found = [finding._asdict() for finding in examine(load({}, config=file).settings)]
        show(found, ("check", "status", "message"), as_json=as_json)
        if any(finding["status"] == "error" for finding in found):
            raise typer.Exit(REFUSED)


def _shown(name: str, value: Any) -> Any:
    """A setting without what is secret in it."""
    match value:
        case SecretStr():
            return str(value)
        case tuple():
            return [str(item) for item in value]
        case Path():
            return str(value)
        case str() if name == "database":
            try:
                return make_url(value).render_as_string(hide_password=True)
            except ArgumentError:
                return "(no URL)"
        case _:
            return value
