"""The command line loads a room when it is called, and says what to install when it cannot."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer

ROOM = """
import json, sys, typer
from typing import Annotated

def one(model: str, port: int = 80, rest: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    'Does one thing.'
    sys.stdout.write(json.dumps([model, port, rest]))

many = typer.Typer()

@many.command()
def first() -> None:
    sys.stdout.write("first")

@many.command()
def second() -> None:
    raise typer.Exit(3)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder to import from, with an installed package that adds the commands `one` and `many`."""
    info = tmp_path / "room-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: room\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trimtab.commands]\none = room:one\nmany = room:many\n")
    (tmp_path / "room.py").write_text(ROOM)
    return tmp_path


def trimtab(*args: str, path: Path | None = None, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; {before}\nfrom trimtab.client.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(path or ""), "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)


def test_help_lists_every_room_and_loads_none(path: Path) -> None:
    (path / "room.py").write_text("raise SystemExit('loaded')")
    run = trimtab("--help", path=path)
    assert run.returncode == 0
    for command in ("attribute", "bundle", "model", "serve", "one", "many"):
        assert f" {command} " in run.stdout


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert trimtab("--version").stdout == f"trimtab {version('trimtab')}\n"


def test_an_unknown_command_exits_with_2() -> None:
    run = trimtab("serv")
    assert run.returncode == 2
    assert "No such command" in run.stderr


def test_a_function_is_a_command(path: Path) -> None:
    run = trimtab("one", "m", "--port", "8000", "--", "--max-model-len", "512", path=path)
    assert json.loads(run.stdout) == ["m", 8000, ["--max-model-len", "512"]]
    assert "Does one thing." in trimtab("one", "--help", path=path).stdout
    assert "trimtab one" in trimtab("one", "--help", path=path).stdout


def test_an_app_is_a_group_of_commands(path: Path) -> None:
    assert trimtab("many", "first", path=path).stdout == "first"
    assert trimtab("many", "second", path=path).returncode == 3


@pytest.mark.parametrize(
    ("args", "extra"),
    [(["attribute"], "trimtab[attribution]"), (["serve", "m"], "trimtab[cpu]")],
)
def test_a_missing_extra_is_named(args: list[str], extra: str) -> None:
    run = trimtab(*args, before="sys.modules.update(numpy=None, torch=None, vllm=None)")
    assert run.returncode == 2
    assert f"is not installed: pip install '{extra}'" in run.stderr
    assert "Traceback" not in run.stderr


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of a group, those of its groups included, with their names."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for part, inner in command.commands.items():
        yield from leaves(inner, f"{name} {part}")


def test_every_command_that_answers_takes_json() -> None:
    """But `serve`, which answers over the network, and `openapi`, which answers in JSON anyway."""
    without = []
    for entry in entry_points(group="trimtab.commands"):
        app = entry.load()
        if not isinstance(app, typer.Typer):
            function, app = app, typer.Typer(add_completion=False)
            app.command()(function)
        found = leaves(typer.main.get_command(app), entry.name)
        without += [name for name, command in found if not any("--json" in option.opts for option in command.params)]
    assert sorted(without) == ["openapi", "serve"]
