"""Whether a file can be written, asked before minutes of work."""

import os
from pathlib import Path

from trimtab.attribution.errors import SettingsError

__all__ = ["check_writable"]


def check_writable(out: Path) -> None:
    """Refuse a place that cannot be written to, without touching it.

    Raises:
        SettingsError: it is a folder, or in a folder that cannot be written to.
    """
    ancestor = next(parent for parent in out.absolute().parents if parent.exists())
    if out.is_dir() or not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise SettingsError(f"cannot write {out}; give --out a file in a folder that you can write to")
