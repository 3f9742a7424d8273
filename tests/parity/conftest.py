"""One offline engine for all tests in here; it ends before the HTTP server of the service's tests starts."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.parity.cases import STEERED, UNSTEERED
from tests.parity.engine import Answer, Engine, ask_cases


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = Engine()
    yield started
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started.close()


@pytest.fixture(scope="package")
def compiled() -> Iterator[Engine]:
    """An engine whose model is compiled, in minutes: once for all tests that ask it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = Engine(enforce_eager=False)
        yield started
        started.close()


@pytest.fixture(scope="package")
def mixed(engine: Engine) -> dict[str, Answer]:
    """All cases, steered and not, in one batch on a cold cache."""
    return ask_cases(engine, (*UNSTEERED, *STEERED))


@pytest.fixture(scope="package")
def unsteered(engine: Engine) -> dict[str, Answer]:
    """The unsteered cases alone in a batch."""
    return ask_cases(engine, UNSTEERED)


@pytest.fixture(scope="package")
def reference() -> Callable[..., Any]:
    from tests.parity.reference import Reference

    return Reference()


@pytest.fixture(scope="package")
def plain() -> dict[str, Any]:
    """What an engine without the plugin says, from a process of its own."""
    env = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.plain"], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers
