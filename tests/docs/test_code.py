"""The Python and the JSON that the pages show are run on the real server, with its addresses and its bundle in their place."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import pytest

from tests.bundles import random_bundle
from tests.conftest import Server
from tests.docs.pages import ROOT, Block, blocks
from tests.e2e.test_generation import wait_for
from trimtab.attribution.bundle import ModelIdentity
from trimtab.client import Arm, Latent, Steering, Trimtab, require_applied

CALL = 'client.completions.create(model="m", prompt="p", steering=Steering(bundle="calm"))'
"""What stands for the user's own code."""
PYTHON = [block for block in blocks("python") if "client.experiments" not in block.text]
"""The life of an experiment takes an admin's key, units and days: `tests/client/test_experiments.py` makes those calls."""
JSON_LINE = re.compile(r'^    (\{".*?\})$', re.DOTALL | re.MULTILINE)


class Shown(NamedTuple):
    """A server with the bundle that stands for the pages' own, which belongs to the other tests."""

    server: Server
    name: str
    """Of the bundle, other in each test: what was revoked cannot come back."""
    folder: Path

    def here(self, page: str, text: str) -> str:
        """The code with this server's addresses, this bundle, and short replies."""
        places = {
            "http://127.0.0.1:8000": self.server.base_url,
            "127.0.0.1:50051": self.server.grpc,
            "pretends-human": self.name,
            '"calm"': f'"{self.name}-too"' if page == "README.md" else f'"{self.name}"',
            "1693": "7",
            "messages=messages": "messages=messages, max_tokens=8",
            "...  # your code, the client's own code, no network": CALL,
        }
        for theirs, ours in places.items():
            text = text.replace(theirs, ours)
        text = re.sub(r"(messages=\[\{.*?\}\]),", r"\1, max_tokens=8,", text)
        # Of the fake server the name is the page's own.
        return text.replace(f'{{"bundle": "{self.name}"}}', '{"bundle": "calm"}')


@pytest.fixture
def shown(
    server: Server,
    embedded_identity: ModelIdentity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Shown]:
    """Its bundle is loaded, and a file lies in the working folder; all of it is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    page, number = request.node.callspec.id.split("-")
    name = f"shown{number}"
    bundle = random_bundle(embedded_identity, name=name, layer=14)
    url = f"{server.base_url}/v1/steering/bundles"
    octets = {"content-type": "application/octet-stream"}
    assert httpx.post(url, content=bundle.to_bytes(), headers=octets, timeout=60).status_code == 201
    named = f"{name}-too" if page == "README.md" else name
    random_bundle(embedded_identity, name=named, layer=14).save(tmp_path / "calm.safetensors")
    yield Shown(server, name, tmp_path)
    httpx.delete(f"{url}/{name}", timeout=60)
    versions = httpx.get(f"{server.base_url}/admin/v1/bundles", timeout=60).json()["data"]
    for version in versions:
        if version["name"] == name and version["state"] != "revoked":
            route = f"{server.base_url}/admin/v1/bundles/{version['reference']}/revoke"
            assert httpx.post(route, json={"reason": "the test is over"}, timeout=60).status_code == 200
    wait_for(lambda: name not in httpx.get(url, timeout=60).text)


@pytest.mark.parametrize("block", PYTHON, ids=[f"{block.page}-{i}" for i, block in enumerate(PYTHON)])
def test_python_runs(shown: Shown, block: Block) -> None:
    calm = Steering(edits=[Latent(shown.name, 7).clamp(0.0).during("completion")])
    with Trimtab(shown.server.base_url) as client:
        names = {
            "openai": openai, "Path": Path, "Arm": Arm, "Steering": Steering, "require_applied": require_applied,
            "client": client, "calm": calm, "messages": [{"role": "user", "content": "What did you do last weekend?"}],
        }  # fmt: skip
        text = shown.here(block.page, block.text)
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
