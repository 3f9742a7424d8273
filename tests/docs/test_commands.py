"""Every command that the pages show is run, or at least parsed by the program that it is for; what is neither is listed here."""

import json
import os
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from tests.bundles import random_bundle
from tests.docs.pages import ROOT, Command, commands
from trimtab.client.cli import main
from trimtab.server.keys.access import scopes_for

ALL = list(dict.fromkeys(commands()))
OPERATIONS = [
    command for command in ALL if command.page == "operations.md" and not (command.is_route or command.inline)
]
RUN = [c for c in OPERATIONS if c.text.startswith(("trimtab registry", "trimtab keys", "trimtab kill", "openssl"))]
"""The operator's guide, run from its beginning to its end on one database."""
NEITHER = {
    "docker": "no Docker engine; tests/deploy reads the file with hadolint",
    "kubectl": "no cluster",
    "helm": "no cluster; tests/deploy renders the chart with Helm's own engine",
    "nsys": "needs an NVIDIA GPU",
    "vllm": "the second node of two",
    "pip": "installs; what it names is checked",
}
OF_THE_TUTORIAL = {"curl", "git", "python"}
"""Which is run as a whole: `test_tutorial.py`."""
BEFORE = {
    "trimtab registry set-default calm:v2": ("registry upload other.tt", "registry promote calm:v2"),
    "trimtab registry sign calm.tt": ("registry download calm:v2 --out calm.tt",),
}
"""What the page takes for granted when it comes to a command."""


def arguments(command: Command) -> list[str]:
    """The words after the program, without variables in front of it and placeholders at its end."""
    words = shlex.split(command.text)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    ends = [i for i, word in enumerate(words) if word in (">", "|", "&", "2>&1")]
    words = words[1 : ends[0]] if ends else words[1:]
    return words[:-1] if words and words[-1] == "…" else words


def program(command: Command) -> str:
    return next(word for word in shlex.split(command.text) if not re.fullmatch(r"[A-Z_]+=.*", word))


@pytest.mark.parametrize("command", [c for c in ALL if program(c) == "make"], ids=lambda c: c.text)
def test_a_target_of_make_is_one(command: Command) -> None:
    targets = [word for word in arguments(command) if "=" not in word and not word.startswith("-")]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("command", [c for c in ALL if program(c) == "pip"], ids=lambda c: c.text)
def test_an_extra_of_pip_is_one(command: Command) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"trimtab\[(\w+)\]", command.text):
        assert name in extras


@pytest.mark.parametrize("command", [c for c in ALL if c.is_route], ids=lambda c: c.text)
def test_a_route_is_one(command: Command) -> None:
    method, path = command.words[:2]
    assert scopes_for(method, path.partition("?")[0]) is not None


@pytest.mark.parametrize("command", [c for c in ALL if program(c) == "trimtab"], ids=lambda c: c.text)
def test_a_command_of_ours_is_parsed_by_it(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, options and their values, as far as they can be judged without running it."""
    monkeypatch.chdir(tmp_path)
    words = arguments(command)
    for word in words:
        if re.fullmatch(r"[\w.-]+\.(tt|pem|jsonl|toml|safetensors|json|pt|txt)", word):
            (tmp_path / word).touch()
    rooms = {entry.name: entry for entry in entry_points(group="trimtab.commands")}
    if words[0] not in rooms:
        assert words[0] in ("--help", "--install-completion")
        return
    leaf, rest = leaf_of(rooms[words[0]].load(), words[1:])
    if rest and not command.inline:
        with leaf.make_context(leaf.name or "", rest):
            pass


def leaf_of(command: Any, words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that does it, and what is left for it."""
    if not isinstance(command, typer.Typer):
        function, command = command, typer.Typer(add_completion=False)
        command.command()(function)
    found: Any = typer.main.get_command(command)
    while words and hasattr(found, "commands"):
        assert words[0] in found.commands, words[0]
        found, words = found.commands[words[0]], words[1:]
    return found, words


def test_what_is_neither_run_nor_parsed_is_on_the_list() -> None:
    known = {"trimtab", "make", "openssl", *NEITHER, *OF_THE_TUTORIAL}
    assert {program(c) for c in ALL if not c.is_route} <= known


def test_the_operators_guide_runs_from_its_beginning_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIMTAB_DATABASE", f"sqlite:///{tmp_path / 'trimtab.db'}")
    monkeypatch.chdir(tmp_path)
    random_bundle().save(tmp_path / "calm.tt")
    random_bundle(seed=1).save(tmp_path / "other.tt")
    told: dict[str, str] = {}

    def ours(line: str) -> str:
        for shown, real in told.items():
            line = line.replace(shown, real)
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line))
        out, err = capsys.readouterr()
        assert ended.value.code in (0, None), (line, out, err)
        return out

    assert len(RUN) >= 15
    for command in RUN:
        for start, lines in BEFORE.items():
            if command.text.startswith(start):
                for line in lines:
                    ours(line)
        if program(command) == "openssl":
            subprocess.run(shlex.split(command.text), check=True, capture_output=True)
            continue
        line = command.text.removeprefix("trimtab ").replace("--reason …", '--reason "a test"')
        line = line.replace("calm:v1 --strength", "calm:v2 --strength")  # v1 is revoked by then
        json_of = ours(f"{line} --json") if line.startswith(("keys create", "registry audit list")) else ours(line)
        if line.startswith("keys create"):
            told["ab12cd34ef"] = json.loads(json_of)["id"]
        if line.startswith("registry audit list"):
            told["sha256:…"] = json.loads(json_of)[-1]["digest"]
    assert (tmp_path / "calm.tt.sig").exists()
    assert os.environ["TRIMTAB_DATABASE"].startswith("sqlite")
