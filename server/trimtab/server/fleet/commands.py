"""`trimtab kill …`: the kill switch at a terminal, on the database itself: no server has to answer, and all of them follow."""

from typing import Annotated

import typer

from trimtab.server.console import actor, show
from trimtab.server.errors import Unsupported
from trimtab.server.fleet.switch import KillSwitch, Mode
from trimtab.server.registry.commands import DatabaseOption, JsonOption, opened
from trimtab.server.registry.version import Running

__all__ = ["kill"]

_COLUMNS = ("mode", "fallback", "running", "reason", "actor", "at")

kill = typer.Typer(
    no_args_is_help=True, add_completion=False, help="The kill switch: all steering off, on every replica."
)


@kill.command()
def on(
    reason: Annotated[
        str, typer.Option(help="Why; callers whose replies it ends are told, and it goes into the audit log.")
    ],
    fallback: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="Steer by this safe default instead: calm, or calm:v3.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the safe default.")] = 1.0,
    refuse: Annotated[
        bool, typer.Option(help="Refuse what would be steered, rather than answer it unsteered.")
    ] = False,
    running: Annotated[str, typer.Option(help="`end` steered requests that run, or let them `finish`.")] = "end",
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Switch all steering off; replies say `killed`."""
    with opened(database) as (opened_database, _):
        if refuse and fallback is not None:
            raise Unsupported("--refuse and --fallback exclude each other")
        what: Running
        match running:
            case "end" | "finish":
                what = running
            case _:
                raise Unsupported(f"--running is end or finish, not {running!r}")
        mode: Mode = "refuse" if refuse else "unsteered" if fallback is None else "fallback"
        safe = None if fallback is None else {"bundle": fallback, "strength": strength}
        thrown = KillSwitch(opened_database).throw(mode, actor=actor(), reason=reason, running=what, fallback=safe)
        show(thrown.document, _COLUMNS, as_json=as_json)


@kill.command()
def off(
    reason: Annotated[str, typer.Option(help="Why it is safe again.")],
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let steering go on."""
    with opened(database) as (opened_database, _):
        show(KillSwitch(opened_database).throw("off", actor=actor(), reason=reason).document, _COLUMNS, as_json=as_json)


@kill.command()
def status(database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Show how it stands."""
    with opened(database) as (opened_database, _):
        show(KillSwitch(opened_database).read().document, _COLUMNS, as_json=as_json)
