"""A server of its own for what would spoil the one that the other tests share: keys are made on it, its bundles come and go."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import random_bundle
from tests.conftest import STOP_SECONDS, TRIMTAB, Server, address
from trimtab.attribution.bundle import ModelIdentity

OPERATOR = "the-operators-own-key-of-the-fuzz"


@pytest.fixture(scope="session")
def bundle_files(embedded_identity: ModelIdentity, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles that the server can load."""
    folder = tmp_path_factory.mktemp("bundles")
    for seed in range(4):
        random_bundle(embedded_identity, name=f"fuzz{seed % 2}", layer=9, seed=seed).save(folder / f"{seed}.tt")
    return folder


@pytest.fixture(scope="session")
def fuzzed(embedded_identity: ModelIdentity, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server with the operator's key; whatever it was sent, it must drain and exit with 0."""
    folder = tmp_path_factory.mktemp("fuzzed")
    bundle = random_bundle(embedded_identity, layer=14)
    bundle.save(folder / "calm.tt")
    log = folder / "server.log"
    command = [str(TRIMTAB), "serve", "smollm2-135m-instruct", "--bundle", str(folder / "calm.tt"), "--port", "0"]
    command += ["--grpc-port", "0", "--allow-bundle-upload", "--", "--dtype", "float32", "--max-model-len", "1024"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRIMTAB_") or k == "TRIMTAB_CACHE"}
    environment |= {"TRIMTAB_DATABASE": f"sqlite:///{folder / 'trimtab.db'}", "TRIMTAB_API_KEY": OPERATOR}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = address(process, log)
        grpc = re.search(r"serving gRPC on (\S+)", log.read_text(errors="replace"))
        assert grpc is not None
        yield Server(url, "smollm2-135m-instruct", bundle, process, log, grpc[1], environment["TRIMTAB_DATABASE"])
        process.terminate()
        assert process.wait(STOP_SECONDS) == 0
        assert "Traceback" not in log.read_text(errors="replace")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
