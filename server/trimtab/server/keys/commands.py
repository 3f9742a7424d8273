"""`trimtab keys …`: keys made, rotated and revoked on the database itself; this is how a first key comes about."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from trimtab.server.console import actor, refusing, say, show
from trimtab.server.database.database import Database, utc_now
from trimtab.server.errors import Unsupported
from trimtab.server.keys.key import Key, Policy, parse_scopes
from trimtab.server.keys.secret import open_secret
from trimtab.server.keys.store import Keys
from trimtab.server.registry.commands import DatabaseOption, JsonOption, ReasonOption
from trimtab.server.settings import load

__all__ = ["keys"]

_COLUMNS = ("id", "label", "scopes", "policy", "created_by", "created_at", "expires_at", "revoked_at", "rotated_from")

keys = typer.Typer(no_args_is_help=True, add_completion=False, help="API keys: make, rotate, revoke, list.")


@contextmanager
def _opened(url: str | None) -> Iterator[Keys]:
    with refusing():
        settings = load({} if url is None else {"database": url}).settings
        database = Database(settings.database)
        try:
            database.migrate()
            given = None if settings.secret is None else settings.secret.get_secret_value()
            yield Keys(database, open_secret(database, given))
        finally:
            database.close()


@keys.command()
def create(
    label: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str], typer.Option(help="infer, steer, author, observe, admin or force; give it once for each.")
    ],
    bundle: Annotated[
        list[str] | None, typer.Option(help="It may name these alone: calm, or calm:v3; once for each.")
    ] = None,
    strength: Annotated[
        tuple[float, float] | None, typer.Option(help="Least and most strength.", metavar="LEAST MOST")
    ] = None,
    opt_out: Annotated[bool, typer.Option(help="It may replace the default steering, or leave it out.")] = False,
    per_minute: Annotated[int | None, typer.Option(help="Requests per minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Requests at a time.")] = None,
    days: Annotated[float | None, typer.Option(min=0.0, help="It expires after so many days.")] = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is shown this once; what is kept is a digest of it."""
    with _opened(database) as store:
        try:
            policy = Policy(
                bundles=tuple(bundle) if bundle else None,
                strength=strength,
                opt_out=opt_out,
                requests_per_minute=per_minute,
                concurrent_requests=concurrent,
            )
        except ValidationError as e:
            raise Unsupported(
                "; ".join(f"{'.'.join(map(str, error['loc'])) or 'policy'}: {error['msg']}" for error in e.errors())
            ) from e
        key, text = store.create(
            label=label,
            scopes=parse_scopes(scope),
            actor=actor(),
            policy=policy,
            expires_at=None if days is None else utc_now() + timedelta(days=days),
        )
        _show_made(key, text, as_json=as_json)


@keys.command()
def rotate(
    key: Annotated[str, typer.Argument(metavar="ID", help="The key's public part.")],
    grace_seconds: Annotated[int, typer.Option(help="How long the old key goes on.")] = 3600,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key that takes over from an old one, which goes on for the grace."""
    with _opened(database) as store:
        new, text = store.rotate(key, actor=actor(), grace_seconds=grace_seconds)
        _show_made(new, text, as_json=as_json)


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="The key's public part.")],
    reason: ReasonOption = "",
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key open nothing from now on."""
    with _opened(database) as store:
        show(_document(store.revoke(key, actor=actor(), reason=reason)), _COLUMNS, as_json=as_json)


@keys.command("list")
def list_keys(database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """List the keys, without what would help to make one."""
    with _opened(database) as store:
        show([_document(key) for key in store.list()], _COLUMNS, as_json=as_json)


def _show_made(key: Key, text: str, *, as_json: bool) -> None:
    if not as_json:
        say("the key is shown this once; keep it where your other secrets are")
    show(_document(key) | {"key": text}, ("key", *_COLUMNS[:4]), as_json=as_json)


def _document(key: Key) -> dict[str, Any]:
    fields = asdict(key) | {"scopes": sorted(key.scopes)}
    del fields["digest"]
    return fields | {"policy": key.policy.model_dump(mode="json", exclude_defaults=True)}
