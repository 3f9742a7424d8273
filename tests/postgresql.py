"""A PostgreSQL of the tests' own: a cluster in a new folder, on a socket in it and a free port, gone afterwards.

It needs Debian's `postgresql` (any release from 13 on) and installs nothing. The server refuses to run as root: where the tests
do, it runs as the user `postgres` that the package makes.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["cluster"]


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """The URL of a running, empty database."""
    binaries = _binaries()
    data = folder / "data"
    folder.chmod(0o711)
    for parent in folder.parents:  # pytest's folders are closed to others, and `postgres` is one.
        if parent == Path("/tmp") or parent == parent.parent:
            break
        parent.chmod(parent.stat().st_mode | 0o011)
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
    control: list[str | Path] = [*user, binaries / "pg_ctl", "-D", data]
    _run([*user, *initdb])
    _run([*control, "-w", "-o", options, "-l", data / "log", "start"])
    try:
        yield f"postgresql://trimtab@127.0.0.1:{port}/postgres"
    finally:
        _run([*control, "-m", "immediate", "stop"])


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
