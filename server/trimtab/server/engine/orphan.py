"""An engine core ends when the process that started it is gone.

vLLM's workers watch their engine core, and nobody watches the front end: a server that is killed (SIGKILL, out of memory) leaves
an engine core that waits for requests for ever, with all of its memory, and the next server finds none.
"""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import wait
from threading import Thread

__all__ = ["end_with_parent"]

_NAME = "EngineCore"
"""How vLLM's process manager names an engine core; of several, with a number behind."""
_SHUTDOWN_SECONDS = 10.0


def end_with_parent() -> None:
    """In an engine core that vLLM started as a process of its own: watch its parent. Anywhere else: nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.current_process().name.startswith(_NAME):
        Thread(target=_watch, args=(parent.sentinel,), name="trimtab-orphan", daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # vLLM's own shutdown, which ends the workers
    time.sleep(_SHUTDOWN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
