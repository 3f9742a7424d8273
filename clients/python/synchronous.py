"""The synchronous client is the asynchronous one without `await`: `make client` writes each of its modules from its twin."""

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["MODULES", "synchronous"]

CLIENT = Path(__file__).parent / "trimtab" / "client"
_ABOUT_HTTP = '''"""The synchronous client: the `openai` SDK's calls with `steering`, and what else a Trimtab server answers.

Over HTTP by default; `grpc://host:port` and `grpcs://host:port` take gRPC. The calls, their types and their errors are the same.
Written by `make client` from `aio`; do not edit.
"""'''
_ABOUT_EXPERIMENTS = '''"""`client.experiments` and `client.outcomes`.

Written by `make client` from `aio_experiments`; do not edit.
"""'''
MODULES = (
    (CLIENT / "aio.py", CLIENT / "http.py", _ABOUT_HTTP),
    (CLIENT / "aio_experiments.py", CLIENT / "experiment_routes.py", _ABOUT_EXPERIMENTS),
)
"""The asynchronous module, the one that is written from it, and what that says of itself."""
_WORDS = (
    (r"\bA Trimtab server\. Close it", "A Trimtab server. Thread-safe; close it"),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\basync_channel\b", "channel"),
    (r"\bgrpc\.aio\b", "grpc"),
    (r"\baio_experiments\b", "experiment_routes"),
    (r"\bAsync([A-Z])", r"\1"),
    (r"__a(enter|exit|iter|next)__", r"__\1__"),
)


def synchronous(source: Path, target: Path, about: str) -> str:
    """The text of `target`: the module `source` without `await`, formatted."""
    text = source.read_text()
    for pattern, word in _WORDS:
        text = re.sub(pattern, word, text)
    text = re.sub(r'\A"""[^"]*"""', about, text)
    ruff = [str(Path(sys.executable).with_name("ruff"))]
    for step in (["check", "--quiet", "--fix", "--select", "I"], ["format", "--quiet"]):
        command = [*ruff, *step, "--stdin-filename", str(target), "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    for module in MODULES:
        module[1].write_text(synchronous(*module))
