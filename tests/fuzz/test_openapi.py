"""Schemathesis against the live server's own OpenAPI document: every check, stateful; no 5xx, no reply that breaks its schema."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import Server
from tests.fuzz.conftest import OPERATOR

HERE = Path(__file__).parent
N_CASES = 2000
_KEY = {"authorization": f"Bearer {OPERATOR}"}
SHARED = (
    r"^/(livez|readyz|startupz|v1/(models|tokenize|detokenize|completions|chat|steering/(validate|inspect|schema)))"
)
"""Routes that leave the server as it was."""


def fuzz(url: str, folder: Path, bundles: Path, *options: str, keyed: bool) -> int:
    """The number of cases of a run in which every check held; what the document says of keys is not true of a server without."""
    document = folder / "openapi.json"
    described = httpx.get(f"{url}/openapi.json", headers=_KEY if keyed else {}, timeout=60).json()
    if not keyed:
        for item in described["paths"].values():
            for operation in item.values():
                operation.pop("security", None)
    document.write_text(json.dumps(described))
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(HERE / "schemathesis.toml")]
    # Without `--checks`, all of them are made but where the file says not; with it, the file is not heard.
    command += ["run", str(document), "--url", url]
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks",
        "FUZZ_BUNDLES": str(bundles),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    run = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    found = re.search(r"(\d+) generated", run.stdout)
    assert found is not None, run.stdout[-2000:]
    return int(found[1])


def steered(server: Server, key: str = "") -> str:
    """What the server says under steering; it must prove it."""
    ask = {
        "model": server.model,
        "prompt": "The sea is",
        "max_tokens": 8,
        "temperature": 0,
        "steering": {"bundle": "calm"},
    }
    headers = {"authorization": f"Bearer {key}"} if key else {}
    reply = httpx.post(f"{server.base_url}/v1/completions", json=ask, headers=headers, timeout=120).json()
    assert reply["steering"]["status"] == "applied", reply
    return str(reply["choices"][0]["text"])


def test_a_few_cases_of_each_route_that_changes_nothing(server: Server, tmp_path: Path, bundle_files: Path) -> None:
    before = steered(server)
    fuzz(
        server.base_url, tmp_path, bundle_files,
        "--include-path-regex", SHARED, "--phases", "fuzzing", "--max-examples", "4", "--seed", "1", keyed=False,
    )  # fmt: skip
    assert steered(server) == before


@pytest.mark.slow
def test_thousands_of_cases_of_every_route(fuzzed: Server, tmp_path: Path, bundle_files: Path) -> None:
    before = steered(fuzzed, OPERATOR)
    n_cases = fuzz(
        fuzzed.base_url, tmp_path, bundle_files,
        "--header", f"Authorization: Bearer {OPERATOR}", "--max-examples", "30", keyed=True,
    )  # fmt: skip
    assert n_cases >= N_CASES
    assert steered(fuzzed, OPERATOR) == before
