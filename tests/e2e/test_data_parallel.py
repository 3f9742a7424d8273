"""Two engine cores behind one server: each holds the bundles, and proves what it did."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import TRIMTAB, Server, address
from tests.parity import tiny
from tests.parity.reference import Reference
from trimtab.attribution.bundle import Bundle, ModelIdentity
from trimtab.attribution.model import identify
from trimtab.client import ConflictError, Latent, Steering, Trimtab, UnknownBundleError
from trimtab.server.plan import compile_plan
from trimtab.server.steering import parse_steering

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
N_TOKENS = 12
START_SECONDS = 600
"""Six processes import vLLM at once."""
ENGINE = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--num-gpu-blocks-override", "128")
PARALLEL = ("--data-parallel-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("parallel")
    tiny.save(made)
    return made


@pytest.fixture(scope="module")
def identity(folder: Path) -> ModelIdentity:
    return identify(str(folder))[0]


@pytest.fixture(scope="module")
def wide(folder: Path, identity: ModelIdentity) -> Iterator[Server]:
    calm = tiny.bundle(1, identity)
    calm.save(folder / "calm.tt")
    log = folder / "server.log"
    command = [TRIMTAB, "serve", folder, "--served-model-name", "tiny", "--bundle", folder / "calm.tt", "--port", "0"]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*map(str, command), "--allow-bundle-upload", "--", *ENGINE, *PARALLEL],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield Server(address(process, log, START_SECONDS), "tiny", calm, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(server: Server, i: int, bundle: str) -> dict[str, Any]:
    """A request of its own: another prompt, another strength."""
    edits = [{"bundle": bundle, "latent": 100, "operation": "add", "amount": 2.0 + 0.1 * i}]
    document = {
        "model": "tiny",
        "prompt": [3 + i, 40, 50, 60 + i, 70],
        "max_tokens": N_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "steering": {"edits": edits},
    }
    reply: dict[str, Any] = server.post("/v1/completions", document).json()
    return document | {"reply": reply}


def ask_many(server: Server, bundle: str, n: int = 32) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda i: ask(server, i, bundle), range(n)))


def check(found: list[dict[str, Any]], bundle: Bundle, folder: Path) -> None:
    """Each reply has the tokens of transformers, and the counts of its plan."""
    reference = Reference(folder)
    for asked in found:
        proof = asked["reply"]["steering"]
        assert (proof["status"], proof["completion_tokens"]) == ("applied", N_TOKENS)
        assert proof["prompt_tokens"] + proof["cached_prompt_tokens"] == len(asked["prompt"]) - 2
        plan = compile_plan(parse_steering(asked["steering"]), {bundle.header.name: bundle})
        assert proof["plan"] == plan.hash
        tokens = asked["reply"]["choices"][0]["token_ids"]
        assert reference(plan, {bundle.content_hash: bundle}, asked["prompt"], tokens).tokens == tokens


def test_every_worker_of_every_core_is_proven(wide: Server) -> None:
    assert "2 worker(s) proven: hooks on 4 layers; bundles: l1" in wide.log.read_text()


def test_replies_of_both_cores_are_those_of_transformers(wide: Server, folder: Path) -> None:
    check(ask_many(wide, "l1"), wide.bundle, folder)
    metrics = httpx.get(wide.base_url + "/metrics").text
    ended = dict(re.findall(r'vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\d+)', metrics))
    assert set(ended) == {"0", "1"}
    assert min(map(int, ended.values())) > 0


@pytest.mark.parametrize("layer", [0, 3])
def test_a_bundle_uploaded_at_run_time_steers_in_both_cores(
    wide: Server, identity: ModelIdentity, folder: Path, layer: int
) -> None:
    bundle = tiny.bundle(layer, identity)
    name = bundle.header.name
    with Trimtab(wide.base_url, max_retries=0) as client:
        client.steering.load(bundle.to_bytes(), pin=True)
        check(ask_many(wide, name), bundle, folder)
        with pytest.raises(ConflictError):
            client.steering.unload(name)
        client.steering.unpin(name)
        client.steering.unload(name)
        with pytest.raises(UnknownBundleError):
            client.steering.validate(Steering(edits=[Latent(name, 100).add(1.0)]))
        assert [found.name for found in client.steering.bundles()] == ["l1"]
        client.steering.load(bundle.to_bytes())
        check(ask_many(wide, name), bundle, folder)
        client.steering.unload(name)
