"""The client stays light, and says what it exports."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab.client


def test_all_is_importable_and_complete() -> None:
    for name in trimtab.client.__all__:
        assert getattr(trimtab.client, name).__module__.startswith("trimtab.client."), name
    assert sorted(trimtab.client.__all__) == trimtab.client.__all__
    assert set(trimtab.client.__all__) <= set(dir(trimtab.client))


def test_the_synchronous_client_is_the_asynchronous_one_without_await() -> None:
    script = Path(__file__).parents[2] / "clients" / "python" / "synchronous.py"
    made = runpy.run_path(str(script))
    for module in made["MODULES"]:
        assert module[1].read_text() == made["synchronous"](*module), "run `make client`"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        trimtab.client.NoSuchThing  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import trimtab.client.http, trimtab.client.aio",
            {"torch", "vllm", "transformers", "fastapi", "grpc", "numpy"},
        ),
        ("import trimtab.client.cli", {"torch", "vllm", "transformers", "fastapi", "grpc", "numpy", "openai"}),
    ],
)
def test_importing_the_client_imports_nothing_heavy(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(*sorted({absent!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
