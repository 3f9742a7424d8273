"""The one real server of the whole run: the embedded model and a bundle of random rows, started once, drained at the end."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundles import random_bundle
from tests.processes import descendants, runs
from trimtab.attribution.bundle import Bundle, ModelIdentity

START_SECONDS = 300
STOP_SECONDS = 90
TRIMTAB = Path(sys.executable).with_name("trimtab")
# As `make test` sets them, for whoever calls pytest: without the first vLLM asks for nearly all of the machine's memory.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Engines that share two cores wait for their workers asleep, those that are forked from here and those that start afresh.
PATIENT = str(Path(__file__).parent / "patient")
sys.path.append(PATIENT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (PATIENT, os.environ.get("PYTHONPATH"))))
# No test reads or writes the user's own database.
os.environ["TRIMTAB_DATABASE"] = f"sqlite:///{Path(tempfile.mkdtemp(prefix='trimtab-')) / 'trimtab.db'}"


OWN_ENGINES = ("architectures/", "test_drafts.py", "test_on_device.py", "test_other_engines.py", "test_parallel.py")
"""In `tests/parity`, what does not use the offline engine of `tests/parity/conftest.py`."""
OF_THE_SERVER = (
    "client/",
    "docs/",
    "e2e/",
    "fuzz/",
    *(f"attribution/test_{of}.py" for of in ("collect", "judge", "validate")),
)


def _group(nodeid: str) -> str:
    """What must stay in one process of `make test`: those that share the offline engine, those that may share the server; any
    other file is a group by itself."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    if path.startswith("parity/") and not path.removeprefix("parity/").startswith(OWN_ENGINES):
        return "engine"
    return "server" if path.startswith(OF_THE_SERVER) else path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The two large groups come first, so that each process begins with one; those that need the server are last of theirs."""
    order = ("engine", "server")

    def place(item: pytest.Item) -> tuple[int, bool]:
        group = _group(item.nodeid)
        return order.index(group) if group in order else len(order), "server" in getattr(item, "fixturenames", ())

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Groups, not tests, are shared out. (pytest-xdist's own `loadgroup` does not see its marks under pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


@dataclass(frozen=True)
class Server:
    """A running `trimtab serve`."""

    base_url: str
    """`http://127.0.0.1:PORT`; the OpenAI API is under `/v1`."""
    model: str
    bundle: Bundle
    process: subprocess.Popen[bytes]
    log: Path
    grpc: str = ""
    """`127.0.0.1:PORT`; empty when it serves none."""
    database: str = ""
    """The URL of its own."""

    def post(self, path: str, document: object, **options: float) -> httpx.Response:
        """The reply to a JSON document."""
        return httpx.post(self.base_url + path, json=document, timeout=options.get("timeout", 120.0))


@pytest.fixture(scope="session")
def embedded_identity() -> ModelIdentity:
    """The embedded model as a bundle names it."""
    from trimtab.attribution.model import identify

    return identify("smollm2-135m-instruct")[0]


@pytest.fixture(scope="session")
def server(embedded_identity: ModelIdentity, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server on a free port, shared by all tests; at its end it must drain, exit with 0, and leave no process behind."""
    folder = tmp_path_factory.mktemp("server")
    bundle = random_bundle(embedded_identity, layer=14)
    bundle.save(folder / "calm.tt")
    log = folder / "server.log"
    command = [
        str(TRIMTAB),
        "serve",
        "smollm2-135m-instruct",
        "--bundle",
        str(folder / "calm.tt"),
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--allow-bundle-upload",
    ]
    flags = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRIMTAB_") or k == "TRIMTAB_CACHE"}
    environment["TRIMTAB_DATABASE"] = f"sqlite:///{folder / 'trimtab.db'}"
    grader = folder / "the.toml"
    grader.write_text('kind = "regex"\nshows = ["the"]\n')
    environment |= {"TRIMTAB_EXPERIMENT_SECONDS": "0.5", "TRIMTAB_GRADERS": json.dumps([str(grader)])}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--", *flags], stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        base_url = address(process, log)
        grpc = re.search(r"serving gRPC on (\S+)", log.read_text(errors="replace"))
        assert grpc is not None
        database = environment["TRIMTAB_DATABASE"]
        running = Server(base_url, "smollm2-135m-instruct", bundle, process, log, grpc[1], database)
        yield running
        _drains(running)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its engine too, gigabytes that outlive a server killed alone
            process.wait()


def address(process: subprocess.Popen[bytes], log: Path, start_seconds: float = START_SECONDS) -> str:
    """Where a `trimtab serve` listens, once it does."""
    deadline = time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        if match := re.search(r"serving \S+ on (http://\S+)", log.read_text(errors="replace")):
            return match[1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _drains(server: Server) -> None:
    """^C in the middle of a stream: the stream ends as it should, then the server exits with 0 and leaves no orphan.

    A second, longer stream holds the drain until all has been looked at: on a busy machine the server was gone before this
    process had asked it anything (`ConnectionRefused`).
    """
    children = descendants(server.process.pid)
    ask = {
        "model": server.model,
        "prompt": "Once upon a time",
        "max_tokens": 80,
        "ignore_eos": True,
        "stream": True,
        "steering": {"bundle": "calm"},
    }
    url = server.base_url + "/v1/completions"
    with (
        httpx.stream("POST", url, json=ask, timeout=STOP_SECONDS) as response,
        httpx.stream("POST", url, json=ask | {"max_tokens": 1000}, timeout=STOP_SECONDS) as holding,
    ):
        lines, held = response.iter_lines(), holding.iter_lines()
        next(lines)
        next(held)  # an iterator that nobody keeps closes its connection, and holds nothing
        os.killpg(server.process.pid, signal.SIGINT)  # ^C in a terminal reaches the engine's processes too.
        deadline = time.monotonic() + 10
        while httpx.get(server.base_url + "/readyz", timeout=30).status_code != 503 and time.monotonic() < deadline:
            time.sleep(0.05)
        refused = server.post("/v1/completions", ask)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["steering"]["completion_tokens"] == 80
    assert server.process.wait(STOP_SECONDS) == 0
    deadline = time.monotonic() + 10
    while any(runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)  # Python's own resource tracker outlives its parent for a moment.
    assert [pid for pid in children if runs(pid)] == []
    assert "Traceback" not in server.log.read_text(errors="replace")
