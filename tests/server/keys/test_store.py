from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from trimtab.server.database.database import Database, utc_now
from trimtab.server.errors import Conflict, InvalidRequest, NotFound, Unauthenticated, Unsupported
from trimtab.server.keys.guard import Guard
from trimtab.server.keys.key import Policy, Scope
from trimtab.server.keys.secret import Secret, open_secret
from trimtab.server.keys.store import Keys

SECRET = Secret("s" * 32)
INFER: frozenset[Scope] = frozenset({"infer"})


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database, SECRET)


def guard(keys: Keys, operator_key: str | None = None) -> Guard:
    made = Guard(SECRET, operator_key=operator_key)
    made.know(keys.list())
    return made


def opens(keys: Keys, text: str) -> bool:
    try:
        return bool(guard(keys).caller(f"Bearer {text}"))
    except Unauthenticated:
        return False


def test_a_key_opens_what_its_scopes_say(keys: Keys) -> None:
    key, text = keys.create(label="app", scopes=INFER, actor="cli:me", policy=Policy(opt_out=True))
    caller = guard(keys).caller(f"bearer {text}")
    assert (caller.name, caller.scopes, caller.policy.opt_out) == (f"key:{key.id}", INFER, True)


def test_the_database_never_holds_a_key(keys: Keys, database: Database) -> None:
    _, text = keys.create(label="app", scopes=INFER, actor="cli:me")
    secret = text.split("_", 2)[2]
    with database.read() as connection:
        tables = sa.inspect(connection).get_table_names()
        rows = [tuple(row) for table in tables for row in connection.exec_driver_sql(f"SELECT * FROM {table}")]
    assert rows
    assert secret not in repr(rows)


def test_the_digest_is_keyed(keys: Keys) -> None:
    """Whoever has the database alone can check no guess."""
    key, text = keys.create(label="app", scopes=INFER, actor="cli:me")
    assert SECRET.digest(text) == key.digest
    assert Secret("t" * 32).digest(text) != key.digest


@pytest.mark.parametrize("change", ["x{}", "{}x", "{}"])
def test_a_key_of_another_public_or_secret_part_opens_nothing(keys: Keys, change: str) -> None:
    _, text = keys.create(label="app", scopes=INFER, actor="cli:me")
    _, other = keys.create(label="other", scopes=INFER, actor="cli:me")
    spliced = text[:14] + other[14:]
    assert opens(keys, text)
    assert not opens(keys, change.format(spliced))
    assert not opens(keys, text[:-1])
    assert not opens(keys, text.upper())


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic abc", "Bearer \x00", "Bearer é", "tt_x"])
def test_what_is_no_key_opens_nothing(keys: Keys, header: str) -> None:
    keys.create(label="app", scopes=INFER, actor="cli:me")
    with pytest.raises(Unauthenticated):
        guard(keys).caller(header)


def test_without_any_key_everybody_is_anonymous_and_from_the_first_on_nobody(keys: Keys) -> None:
    assert guard(keys).caller("").name == "anonymous"
    key, _ = keys.create(label="app", scopes=INFER, actor="cli:me")
    with pytest.raises(Unauthenticated):
        guard(keys).caller("")
    keys.revoke(key.id, actor="cli:me")
    with pytest.raises(Unauthenticated):
        guard(keys).caller("")


def test_the_operators_own_key_opens_everything(keys: Keys) -> None:
    assert guard(keys, "0123456789abcdef").caller("Bearer 0123456789abcdef").name == "operator"
    with pytest.raises(Unauthenticated):
        guard(keys, "0123456789abcdef").caller("Bearer 0123456789abcdeF")


def test_an_expired_key_opens_nothing(keys: Keys) -> None:
    _, gone = keys.create(label="a", scopes=INFER, actor="me", expires_at=utc_now() - timedelta(seconds=1))
    _, good = keys.create(label="b", scopes=INFER, actor="me", expires_at=utc_now() + timedelta(hours=1))
    elsewhere = datetime.now(UTC).astimezone().replace(microsecond=0) - timedelta(hours=1)
    _, local = keys.create(label="c", scopes=INFER, actor="me", expires_at=elsewhere)
    assert (opens(keys, gone), opens(keys, good), opens(keys, local)) == (False, True, False)


def test_a_revoked_key_opens_nothing(keys: Keys) -> None:
    key, text = keys.create(label="app", scopes=INFER, actor="me")
    assert keys.revoke(key.id, actor="me").revoked_at is not None
    assert not opens(keys, text)


def test_a_rotated_key_goes_on_for_the_grace(keys: Keys, database: Database) -> None:
    key, old = keys.create(label="app", scopes=INFER, actor="me", policy=Policy(concurrent_requests=2))
    new, text = keys.rotate(key.id, actor="me", grace_seconds=60)
    assert (new.scopes, new.policy, new.rotated_from) == (key.scopes, key.policy, key.id)
    assert opens(keys, old)
    assert opens(keys, text)
    again, _ = keys.rotate(new.id, actor="me", grace_seconds=0)
    assert not opens(keys, text)
    with pytest.raises(Conflict, match="not valid any more"):
        keys.rotate(new.id, actor="me")
    assert [entry.action for entry in database.entries()] == ["key.create", "key.rotate", "key.rotate"]
    assert again.id != new.id


def test_a_rotation_never_lengthens_a_key(keys: Keys) -> None:
    soon = utc_now() + timedelta(seconds=5)
    key, _ = keys.create(label="app", scopes=INFER, actor="me", expires_at=soon)
    keys.rotate(key.id, actor="me", grace_seconds=3600)
    assert next(k for k in keys.list() if k.id == key.id).expires_at == key.expires_at


@pytest.mark.parametrize("label", ["", " ", "x" * 101, "a\nb"])
def test_a_label_says_what_the_key_is_for(keys: Keys, label: str) -> None:
    with pytest.raises(InvalidRequest, match="label"):
        keys.create(label=label, scopes=INFER, actor="me")


def test_a_key_that_is_not_there_is_not_found(keys: Keys) -> None:
    """One with a NUL in it was a 503 on PostgreSQL, which takes none in a text."""
    for name in ("nowhere", "no\0where"):
        with pytest.raises(NotFound):
            keys.revoke(name, actor="me")


def test_sqlite_keeps_its_secret_in_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    secret = open_secret(database, None)
    path = tmp_path / "trimtab.db.secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert open_secret(database, None).digest("x") == secret.digest("x")
    path.unlink()
    with pytest.raises(Unsupported, match="not the one"):
        open_secret(database, None)
    database.close()


@pytest.mark.slow
def test_postgresql_needs_a_secret_from_elsewhere(postgresql: str) -> None:
    database = Database(postgresql)
    with pytest.raises(Unsupported, match="TRIMTAB_SECRET"):
        open_secret(database, None)
    database.close()


def test_a_replica_with_another_secret_does_not_start(database: Database) -> None:
    open_secret(database, "s" * 32)
    with pytest.raises(Unsupported, match="the same TRIMTAB_SECRET"):
        open_secret(database, "t" * 32)


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(Unsupported, match="shorter than 32"):
        Secret("short")
