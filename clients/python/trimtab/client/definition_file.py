"""The definition of an experiment in a file: JSON, TOML, or YAML (`pip install 'trimtab[reports]'`)."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["read_definition"]


def read_definition(path: Path) -> Mapping[str, Any]:
    """What the file says; the server checks it.

    Raises:
        ValueError: it cannot be read, or is no object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        match path.suffix.lower():
            case ".json":
                found = json.loads(text)
            case ".toml":
                found = tomllib.loads(text)
            case ".yaml" | ".yml":
                found = _yaml(text, path)
            case other:
                raise ValueError(f"{path} ends in {other!r}; a definition is a .json, .toml or .yaml file")
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from e
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from e
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold an object, not {type(found).__name__}")
    return found


def _yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"{path} cannot be read: {e}") from e
