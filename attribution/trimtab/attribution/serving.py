"""The endpoint that a command samples from: one that runs, or a Trimtab server for as long as the command does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai

from trimtab.attribution.errors import ServingError
from trimtab.client.calls import root

__all__ = ["client_of", "first_model", "reachable", "serving"]

START_SECONDS = 900
STOP_SECONDS = 90


@contextmanager
def serving(url: str | None, model: str, *, bundles: Sequence[Path] = (), flags: Sequence[str] = ()) -> Iterator[str]:
    """The base URL of a server: `url` where one is named, else that of `trimtab serve MODEL`, stopped at the end.

    Raises:
        ServingError: the server does not start; the message ends with its own last words.
    """
    if url is not None:
        yield url
        return
    program = shutil.which("trimtab", path=str(Path(sys.executable).parent)) or shutil.which("trimtab")
    if program is None:
        raise ServingError("there is no `trimtab` command to start a server with; name a running one with --url")
    command = [program, "serve", model, "--port", "0", "--allow-bundle-upload"]
    for bundle in bundles:
        command += ["--bundle", str(bundle)]
    environment = {**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--", *flags], stdout=out, stderr=out, env=environment, start_new_session=True
            )
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def client_of(url: str, api_key: str | None) -> openai.OpenAI:
    """A stock client of a server that is given with or without its `/v1`.

    Raises:
        ServingError: it is no http(s) URL.
    """
    try:
        return openai.OpenAI(base_url=root(url), api_key=api_key or "none", max_retries=4, timeout=600)
    except ValueError as e:
        raise ServingError(f"--url: {e}") from e


def first_model(url: str, api_key: str | None) -> str:
    """The name of the first model that an endpoint serves.

    Raises:
        ServingError: it cannot be reached, or serves none.
    """
    with client_of(url, api_key) as client, reachable(url):
        names = [model.id for model in client.models.list()]
    if not names:
        raise ServingError(f"{url} serves no model; name another with --url")
    return names[0]


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Say in one sentence what an endpoint refuses, or that it is not there."""
    try:
        yield
    except openai.APIStatusError as e:
        raise ServingError(f"{url} refused a request ({e.status_code}): {e.message}") from e
    except openai.APIConnectionError as e:
        raise ServingError(
            f"{url} cannot be reached ({e.__cause__ or e}); check --url, then start again: what is done stays done"
        ) from e


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if match := re.search(r"serving \S+ on (http://\S+)", log.read_text(errors="replace")):
            return match[1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(words) if line.startswith("trimtab: ")), words[-1] if words else "no word")
    raise ServingError(f"the server did not start: {last.removeprefix('trimtab: ')}")
