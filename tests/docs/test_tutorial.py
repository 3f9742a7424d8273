import subprocess
import sys

import pytest

from docs.tutorial import ROOT, script


def test_the_script_is_one_for_the_shell() -> None:
    for install in (False, True):
        subprocess.run(["bash", "-n", "-c", script(install)], check=True)
    assert "make install" in script(install=True)


@pytest.mark.slow
def test_the_tutorial_runs_to_its_end() -> None:
    run = subprocess.run([sys.executable, "-m", "docs.tutorial"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    assert "applied ['pretends-human:v1'] 48 tokens" in run.stdout
