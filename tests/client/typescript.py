"""The TypeScript client and the stock `openai` SDK for Node against the real server: `make test-typescript` names this file."""

import os
import subprocess
from pathlib import Path

from tests.conftest import Server

PACKAGE = Path(__file__).parents[2] / "clients" / "typescript"


def test_the_typescript_client_against_the_real_server(server: Server) -> None:
    environment = os.environ | {"TRIMTAB_URL": server.base_url, "TRIMTAB_MODEL": server.model}
    subprocess.run(["npm", "run", "test:server"], cwd=PACKAGE, env=environment, check=True, timeout=600)
