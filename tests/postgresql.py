"""A PostgreSQL of the tests' own: a cluster in a new folder, on a socket in it and a free port, gone afterwards.

It needs Debian's `postgresql` (any release from 13 on) and installs nothing. The server refuses to run as root: where the tests
do, it runs as the user `postgres` that the package makes.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Cluster", "cluster"]


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL server."""

    url: str
    _control: list[str | Path]
    _start: list[str | Path]

    def start(self) -> None:
        """Starts it."""
        _run([*self._control, *self._start])

    def stop(self) -> None:
        """Stops it as a crash would."""
        _run([*self._control, "-m", "immediate", "stop"])


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A running server with an empty database."""
    binaries = _binaries()
    # Not in pytest's own folders: each run closes those to others, and `postgres` is one.
    folder = Path(tempfile.mkdtemp(prefix="trimtab-postgresql-"))
    folder.chmod(0o711)
    data = folder / "data"
    data.mkdir()
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(data, "postgres", "postgres")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    initdb: list[str | Path] = [
        binaries / "initdb",
        "-D",
        data,
        "-U",
        "trimtab",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-sync",
    ]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    _run([*user, *initdb])
    made = Cluster(
        f"postgresql://trimtab@127.0.0.1:{port}/postgres",
        [*user, binaries / "pg_ctl", "-D", data],
        ["-w", "-o", options, "-l", data / "log", "start"],
    )
    made.start()
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        pytest.fail(f"{command}: {done.stdout}{done.stderr}")


def _binaries() -> Path:
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    found = shutil.which("initdb")
    if found is None:
        pytest.fail("PostgreSQL is not installed: apt-get install postgresql")
    return Path(found).resolve().parent
