"""`trimtab registry …`: the registry's verbs at a terminal, on the database itself, so that they work while no server runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.server.console import actor, refusing, say, show, tell
from trimtab.server.database import audit as chain
from trimtab.server.database.database import Database
from trimtab.server.errors import Unsupported
from trimtab.server.registry.signature import Signatures
from trimtab.server.registry.signature import sign as sign_bytes
from trimtab.server.registry.store import Registry
from trimtab.server.registry.version import Running, State, Version, split
from trimtab.server.settings import load

__all__ = ["registry"]

DatabaseOption = Annotated[
    str | None,
    typer.Option(help="sqlite:///FILE or postgresql://…; TRIMTAB_DATABASE or the user's own file by default."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReasonOption = Annotated[str, typer.Option(help="Why; it goes into the audit log.")]
VersionArgument = Annotated[str, typer.Argument(metavar="NAME:vN", help="A version, such as calm:v3.")]
_COLUMNS = ("reference", "state", "is_default", "model", "hook_point", "n_bytes", "signed", "created_by", "created_at")

registry = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Versions of bundles: upload, promote, revoke; who changed what."
)
audit = typer.Typer(no_args_is_help=True, add_completion=False, help="The audit log of every change.")
registry.add_typer(audit, name="audit")


@contextmanager
def opened(url: str | None) -> Iterator[tuple[Database, Signatures]]:
    """The database of the settings, with its tables; errors become sentences."""
    with refusing():
        settings = load({} if url is None else {"database": url}).settings
        database = Database(settings.database)
        try:
            database.migrate()
            yield database, Signatures(settings.signatures, settings.trusted_keys)
        finally:
            database.close()


def document(version: Version) -> dict[str, Any]:
    """A version as it is shown."""
    fields = asdict(version) | {"reference": version.reference, "signed": version.signature is not None}
    return {name: value for name, value in fields.items() if name != "signature"}


@registry.command()
def upload(
    file: Annotated[Path, typer.Argument(help="A bundle.")],
    signature: Annotated[Path | None, typer.Option(help="Its signature; FILE.sig if there is one.")] = None,
    reason: ReasonOption = "",
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a bundle as a new version, a draft; the same bytes are the same version."""
    with opened(database) as (opened_database, signatures):
        beside = file.with_name(file.name + ".sig")
        signature = signature or (beside if beside.exists() else None)
        text = None if signature is None else _read(signature).decode(errors="replace")
        store = Registry(opened_database, signatures)
        version, is_new = store.upload(_read(file), actor=actor(), signature=text, reason=reason)
        if not is_new:
            say(f"these bytes are {version.reference} already")
        show(document(version), _COLUMNS, as_json=as_json)


@registry.command()
def promote(
    version: VersionArgument,
    default: Annotated[bool, typer.Option(help="Make it what the name alone means, too.")] = False,
    reason: ReasonOption = "",
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a draft active: requests may name it."""
    with opened(database) as (opened_database, signatures):
        done = Registry(opened_database, signatures).promote(
            *split(version), actor=actor(), reason=reason, default=default
        )
        show(document(done), _COLUMNS, as_json=as_json)


@registry.command("set-default")
def set_default(
    version: VersionArgument, reason: ReasonOption = "", database: DatabaseOption = None, as_json: JsonOption = False
) -> None:
    """Make an active version what its name alone means."""
    with opened(database) as (opened_database, signatures):
        done = Registry(opened_database, signatures).set_default(*split(version), actor=actor(), reason=reason)
        show(document(done), _COLUMNS, as_json=as_json)


@registry.command()
def revoke(
    version: VersionArgument,
    reason: Annotated[str, typer.Option(help="Why; callers are told, and it goes into the audit log.")],
    running: Annotated[
        str, typer.Option(help="`end` requests that run on it with an error, or let them `finish`.")
    ] = "end",
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a version out of use, for good, on every replica."""
    with opened(database) as (opened_database, signatures):
        what: Running
        match running:
            case "end" | "finish":
                what = running
            case _:
                raise Unsupported(f"--running is end or finish, not {running!r}")
        done = Registry(opened_database, signatures).revoke(*split(version), actor=actor(), reason=reason, running=what)
        show(document(done), _COLUMNS, as_json=as_json)


@registry.command("list")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="Of this bundle alone.")] = None,
    state: Annotated[str | None, typer.Option(help="draft, active or revoked.")] = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the versions."""
    with opened(database) as (opened_database, signatures):
        wanted: State | None
        match state:
            case None | "draft" | "active" | "revoked":
                wanted = state
            case _:
                raise Unsupported(f"--state is draft, active or revoked, not {state!r}")
        found = Registry(opened_database, signatures).list(name=name, state=wanted)
        show([document(version) for version in found], _COLUMNS, as_json=as_json)


@registry.command()
def download(
    version: VersionArgument,
    out: Annotated[Path, typer.Option(help="Where to write the bundle.")],
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the bytes of a version to a file."""
    with opened(database) as (opened_database, signatures):
        store = Registry(opened_database, signatures)
        found = store.find(*split(version))
        out.write_bytes(store.data(found))
        tell(f"wrote {out}", document(found) | {"file": str(out)}, as_json=as_json)


@registry.command()
def sign(
    file: Annotated[Path, typer.Argument(help="A bundle.")],
    key: Annotated[Path, typer.Option(help="An elliptic-curve private key, PEM.")],
    password: Annotated[str | None, typer.Option(envvar="TRIMTAB_SIGNING_PASSWORD", help="Of the key.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a bundle: writes FILE.sig, which `upload` takes along."""
    with refusing():
        signature = file.with_name(file.name + ".sig")
        signature.write_text(sign_bytes(_read(file), key, password))
        tell(f"wrote {signature}", {"file": str(file), "signature": str(signature)}, as_json=as_json)


@registry.command()
def migrate(database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Make the tables, or bring them up to this release; the server and every command do it by themselves, too."""
    with opened(database) as (opened_database, _):
        told = {"database": repr(opened_database), "changes": opened_database.sequence()}
        tell(f"{opened_database!r} is at this release", told, as_json=as_json)


@audit.command("list")
def list_entries(
    after: Annotated[int, typer.Option(min=0, help="Leave out the first so many.")] = 0,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the changes."""
    with opened(database) as (opened_database, _):
        entries = [entry._asdict() for entry in opened_database.entries(after=after)]
        show(entries, ("sequence", "at", "actor", "action", "subject", "detail"), as_json=as_json)


@audit.command()
def verify(
    head: Annotated[str | None, typer.Option(help="A digest noted earlier that must be in the log.")] = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the chain: exit code 0 if the log is whole, 2 and where it breaks if not."""
    with opened(database) as (opened_database, _):
        last = chain.verify(opened_database.entries(), head=head)
        found = {"entries": last.sequence if last else 0, "head": last.digest if last else chain.BEGINNING}
        show(found, ("entries", "head"), as_json=as_json)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise Unsupported(f"{path} cannot be read: {e.strerror}") from e
