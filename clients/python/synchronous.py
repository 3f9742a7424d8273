"""The synchronous client is the asynchronous one without `await`: `make client` writes `http.py` from `aio.py`."""

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["HTTP", "synchronous"]

CLIENT = Path(__file__).parent / "trimtab" / "client"
AIO, HTTP = CLIENT / "aio.py", CLIENT / "http.py"
_ABOUT = '''"""The synchronous client: the `openai` SDK's calls with `steering`, and what else a Trimtab server answers.

Over HTTP by default; `grpc://host:port` and `grpcs://host:port` take gRPC. The calls, their types and their errors are the same.
Written by `make client` from `aio`; do not edit.
"""'''
_WORDS = (
    (r'\A"""[^"]*"""', _ABOUT),
    (r"\bA Trimtab server\. Close it", "A Trimtab server. Thread-safe; close it"),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\basync_channel\b", "channel"),
    (r"\bgrpc\.aio\b", "grpc"),
    (r"\baio_experiments\b", "experiment_routes"),
    (r"\bAsync([A-Z])", r"\1"),
    (r"__a(enter|exit|iter|next)__", r"__\1__"),
)


def synchronous(text: str) -> str:
    """The same module without `await`, formatted."""
    for pattern, word in _WORDS:
        text = re.sub(pattern, word, text)
    ruff = [str(Path(sys.executable).with_name("ruff"))]
    for step in (["check", "--quiet", "--fix", "--select", "I"], ["format", "--quiet"]):
        command = [*ruff, *step, "--stdin-filename", str(HTTP), "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    HTTP.write_text(synchronous(AIO.read_text()))
