"""The Python and the JSON that the pages show are run on the real server, with its addresses and its bundle in their place."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.bundles import random_bundle
from tests.conftest import Server
from tests.docs.pages import ROOT, blocks
from tests.e2e.test_generation import wait_for
from trimtab.attribution.bundle import ModelIdentity
from trimtab.client import Arm, Latent, Steering, Trimtab, require_applied

NAME = "shown"
"""Of the bundle that stands for those of the pages: theirs belongs to the other tests."""
CALL = 'client.completions.create(model="m", prompt="p", steering=Steering(bundle="calm"))'
"""What stands for the user's own code."""
PYTHON = blocks("python")
JSON_LINE = re.compile(r'^    (\{".*?\})$', re.DOTALL | re.MULTILINE)


@pytest.fixture
def shown(
    server: Server, embedded_identity: ModelIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """The server with the pages' bundle loaded, whose file lies in the working folder; all of it is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "calm.safetensors"
    random_bundle(embedded_identity, name=NAME, layer=14).save(file)
    url = f"{server.base_url}/v1/steering/bundles"
    octets = {"content-type": "application/octet-stream"}
    assert httpx.post(url, content=file.read_bytes(), headers=octets, timeout=60).status_code == 201
    yield server
    httpx.delete(f"{url}/{NAME}", timeout=60)
    versions = httpx.get(f"{server.base_url}/admin/v1/bundles").json()["data"]
    for version in versions:
        if version["name"] == NAME and version["state"] != "revoked":
            route = f"{server.base_url}/admin/v1/bundles/{version['reference']}/revoke"
            assert httpx.post(route, json={"reason": "the test is over"}).status_code == 200
    wait_for(lambda: NAME not in httpx.get(url).text)


def here(text: str, server: Server) -> str:
    """The code with this server's addresses and this bundle."""
    places = {
        "http://127.0.0.1:8000": server.base_url,
        "127.0.0.1:50051": server.grpc,
        "pretends-human": NAME,
        '"calm"': f'"{NAME}"',
        "1693": "7",
        "...  # your code, the client's own code, no network": CALL,
    }
    for theirs, ours in places.items():
        text = text.replace(theirs, ours)
    # Of a comparison and of the fake server the names are the page's own.
    return text.replace(f'found["{NAME}"]', 'found["calm"]').replace(f'{{"bundle": "{NAME}"}}', '{"bundle": "calm"}')


@pytest.mark.parametrize("block", PYTHON, ids=[f"{block.page}-{i}" for i, block in enumerate(PYTHON)])
def test_python_runs(shown: Server, block: Any) -> None:
    calm = Steering(edits=[Latent(NAME, 7).clamp(0.0).during("completion")])
    with Trimtab(shown.base_url) as client:
        names = {
            "openai": openai, "Path": Path, "Arm": Arm, "Steering": Steering, "require_applied": require_applied,
            "client": client,
            "calm": calm, "messages": [{"role": "user", "content": "What did you do last weekend?"}],
        }  # fmt: skip
        text = here(block.text, shown)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, block.page, "exec"), names)
        if "print(" in text:
            assert out.getvalue().strip()


@pytest.mark.parametrize(
    ("heading", "route"), [("## Compare", "/v1/steering/compare"), ("## Inspect", "/v1/steering/inspect")]
)
def test_a_request_of_the_grpc_page_is_answered(server: Server, heading: str, route: str) -> None:
    section = (ROOT / "docs" / "grpc.md").read_text().partition(heading)[2].partition("\n## ")[0]
    found = JSON_LINE.search(section)
    assert found is not None
    document = json.loads(found[1])
    reply = server.post(route, document)
    assert reply.status_code == 200, reply.text
    if document.get("stream"):
        assert reply.text.rstrip().endswith("[DONE]")
