"""A file that is there whole, or as it was before."""

import os
from contextlib import suppress
from pathlib import Path

from trimtab.attribution.errors import SettingsError

__all__ = ["write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write beside, flush, rename.

    Raises:
        SettingsError: the disk is full, or the folder cannot be written to.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError as e:
        raise SettingsError(f"cannot write {path}: {e.strerror}; make room, or name another folder") from e
    finally:
        with suppress(OSError):  # Gone already when it became the file.
            partial.unlink()
