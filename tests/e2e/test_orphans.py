"""A server that is killed leaves nothing behind."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import TRIMTAB, address
from tests.parity import tiny
from tests.processes import descendants, name, runs

ENDS_SECONDS = 30


@pytest.mark.slow
def test_a_killed_server_leaves_no_engine_behind(tmp_path: Path) -> None:
    tiny.save(tmp_path)
    log = tmp_path / "server.log"
    flags = ("--dtype", "float32", "--max-model-len", "256", "--num-gpu-blocks-override", "64")
    with log.open("wb") as out:
        command = [TRIMTAB, "serve", tmp_path, "--served-model-name", "tiny", "--port", "0", "--", *flags]
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    children: list[int] = []
    try:
        address(process, log)
        children = descendants(process.pid)
        assert any("EngineCore" in name(child) for child in children)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + ENDS_SECONDS
        while (left := [child for child in children if runs(child)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, [name(child) for child in left]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
