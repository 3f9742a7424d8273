import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import httpx
import pytest

from trimtab.server.service.launch import INTERRUPTED, _interrupt_is_ours, _server, _terminable


def blocked() -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def test_processes_started_for_the_engine_do_not_see_an_interrupt() -> None:
    with _interrupt_is_ours(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        theirs = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    assert signal.SIGINT in theirs
    assert signal.SIGINT not in blocked()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_unwinds_it(number: int) -> None:
    def start() -> None:
        with _terminable(), _interrupt_is_ours():
            os.kill(os.getpid(), number)
            for _ in range(100):
                time.sleep(0.01)

    with pytest.raises(SystemExit) as stopped:
        start()
    assert stopped.value.code == INTERRUPTED


def test_handlers_are_as_before_after_the_start() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with _terminable():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_importing_the_command_imports_no_engine() -> None:
    code = "import sys, trimtab.server.commands, trimtab.server.service.preflight; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_idle_connection_is_kept_longer_than_clients_and_load_balancers_keep_theirs() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    kept = _server(app, None).config.timeout_keep_alive
    assert kept > (httpx.Limits().keepalive_expiry or 0)
    assert kept > 60
