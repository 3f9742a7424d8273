"""The secret that keys the digests of API keys: who reads the database alone can neither use a key nor try guesses at one.

A digest is HMAC-SHA-256 of a key that has 256 random bits: nothing can be guessed, so a slow password hash would only cost every
request tens of milliseconds. The secret lives outside the database: in TRIMTAB_SECRET, or in a file beside an SQLite database.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import sqlalchemy as sa

from trimtab.server.database.database import Database
from trimtab.server.database.schema import secret_check
from trimtab.server.errors import Unsupported

__all__ = ["Secret", "open_secret"]

MIN_LENGTH = 32


class Secret:
    """Makes and compares digests."""

    def __init__(self, text: str) -> None:
        """Of at least 32 characters.

        Raises:
            Unsupported: it is shorter.
        """
        if len(text) < MIN_LENGTH:
            raise Unsupported(
                f"TRIMTAB_SECRET is shorter than {MIN_LENGTH} characters; make one with `openssl rand -hex 32`"
            )
        self._key = text.encode()

    def __repr__(self) -> str:
        return "Secret(…)"

    def digest(self, text: str) -> str:
        """What is kept in place of a key."""
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    @staticmethod
    def equal(one: str, other: str) -> bool:
        """Whether two digests are equal, in a time that tells nothing."""
        return hmac.compare_digest(one, other)


def open_secret(database: Database, given: str | None) -> Secret:
    """The secret of a database's keys: the given one, or that in the file beside an SQLite database, which is made if need be.

    Raises:
        Unsupported: there is none, or it is not the one that this database's keys were made with.
    """
    text = given if given is not None else _beside(database)
    secret = Secret(text)
    expected = secret.digest("trimtab")
    with database.read() as connection:
        known = connection.execute(sa.select(secret_check.c.digest)).scalar_one_or_none()
    if known is None:
        with database.change("server") as change:
            known = change.connection.execute(sa.select(secret_check.c.digest)).scalar_one_or_none()
            if known is None:
                known = expected
                change.connection.execute(secret_check.insert().values(name="api_key", digest=expected))
                change.record("secret.set", "api_key", {})
    if not hmac.compare_digest(known, expected):
        raise Unsupported(
            f"the secret is not the one that the keys in {database!r} were made with; give every replica the same TRIMTAB_SECRET"
        )
    return secret


def _beside(database: Database) -> str:
    if database.file is None:
        raise Unsupported(
            "keys in PostgreSQL need a secret that is not in it: set TRIMTAB_SECRET (`openssl rand -hex 32`), the same on "
            "every replica"
        )
    path = database.file.with_name(database.file.name + ".secret")
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    except OSError as e:
        raise Unsupported(f"the secret {path} cannot be written ({e.strerror}); set TRIMTAB_SECRET") from e
    return _read(path)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as e:
        raise Unsupported(f"the secret {path} cannot be read ({e.strerror}); set TRIMTAB_SECRET") from e
