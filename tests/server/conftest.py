import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import random_bundle
from tests.postgresql import cluster
from trimtab.client.cli import main
from trimtab.server.database.database import Database


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL database; what a test leaves in it is dropped before the next."""
    with cluster() as running:
        yield running.url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'trimtab.db'}"
    url: str = request.getfixturevalue("postgresql")
    database = Database(url)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    database.close()
    return url


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the tables, to be copied: a migration takes a while, and hundreds of tests want one."""
    file = tmp_path_factory.mktemp("migrated") / "trimtab.db"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    database.close()
    return file


@pytest.fixture
def database(database_url: str, migrated: Path) -> Iterator[Database]:
    """A database with its tables."""
    opened = Database(database_url)
    if opened.file is not None:
        shutil.copy(migrated, opened.file)
    else:
        opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the CLI on a database of its own; gives the exit code and, with --json, what was printed."""
    monkeypatch.setenv("TRIMTAB_DATABASE", f"sqlite:///{tmp_path / 'trimtab.db'}")
    monkeypatch.chdir(tmp_path)
    random_bundle().save(tmp_path / "calm.tt")

    def run(*arguments: str) -> tuple[int, Any]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), json.loads(out) if "--json" in arguments and out else err

    return run
