"""Runs docs/tutorial.md, block by block, in one shell, and prints what each step took: `make tutorial`.

The first step, the clone and its installation, is left out unless `--install` is given: it is that of this environment.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).with_name("tutorial.md")
ROOT = PAGE.parents[1]
_STEP = re.compile(r"^## (\d+ .*?)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CLONE = "https://github.com/trimtab/trimtab"


def main() -> int:
    """The exit code of the shell: that of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="clone this repository and install it first")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trimtab-tutorial-") as folder:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRIMTAB_") or k == "TRIMTAB_CACHE"}
        environment["TRIMTAB_DATABASE"] = f"sqlite:///{folder}/trimtab.db"
        if not args.install:
            environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        return subprocess.run(["bash", "-c", script(args.install)], cwd=folder, env=environment, check=False).returncode


def script(install: bool) -> str:
    """All steps as one script; whatever happens, no server is left."""
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", "began=$SECONDS"]
    for title, text in _STEP.findall(PAGE.read_text()):
        if title.startswith("1 ") and not install:
            continue
        code = "\n".join(_BLOCK.findall(text)).replace(_CLONE, f"--quiet {ROOT} trimtab")
        lines += [f"echo; echo '== {title}'; step=$SECONDS", code, f"echo '== {title}: '$((SECONDS - step))' s'"]
    return "\n".join([*lines, "echo '== in all: '$((SECONDS - began))' s'"])


if __name__ == "__main__":
    sys.exit(main())
