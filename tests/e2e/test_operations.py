"""What an operator is promised, on the real server, measured: versions, revocation, the kill switch, defaults, the audit log.

Changes are written by this process into the server's database, as another replica or `trimtab registry` would.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundles import random_bundle
from tests.conftest import Server
from tests.e2e.test_generation import metric, wait_for
from tests.processes import WITHIN, descendants
from trimtab.attribution.bundle import ModelIdentity
from trimtab.server.database.audit import verify
from trimtab.server.database.database import Database
from trimtab.server.fleet.defaults import DefaultSteering
from trimtab.server.fleet.switch import KillSwitch
from trimtab.server.registry.store import Registry

MODEL = "smollm2-135m-instruct"
ME = "cli:test"
LONG = {"model": MODEL, "prompt": "The sea is", "max_tokens": 200, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[Database]:
    opened = Database(server.database)
    yield opened
    verify(opened.entries())
    opened.close()


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


@pytest.fixture
def switch(server: Server, database: Database) -> Iterator[KillSwitch]:
    """The kill switch, which is off again afterwards."""
    switch = KillSwitch(database)
    yield switch
    switch.throw("off", actor=ME, reason="the test is over")
    wait_for(lambda: httpx.get(f"{server.base_url}/admin/v1/kill").json()["mode"] == "off")


_seeds = iter(range(1000, 2000))


@pytest.fixture
def version(server: Server, registry: Registry, embedded_identity: ModelIdentity) -> Iterator[str]:
    """A new version of `tidy`, active, the default, and loaded."""
    bundle = random_bundle(embedded_identity, name="tidy", layer=9, seed=next(_seeds))
    stored, _ = registry.upload(bundle.to_bytes(), actor=ME)
    registry.promote("tidy", stored.number, actor=ME, default=True)
    wait_for(lambda: ask(server, {"bundle": stored.reference}, max_tokens=1).status_code == 200)
    yield stored.reference
    registry.revoke("tidy", stored.number, actor=ME, reason="the test is over")


def ask(server: Server, steering: Any, **fields: Any) -> httpx.Response:
    document = {"model": MODEL, "prompt": "The sea is", "max_tokens": 4, "temperature": 0, **fields}
    return server.post("/v1/completions", document if steering is None else {**document, "steering": steering})


def validate(server: Server, name: str) -> httpx.Response:
    return server.post("/v1/steering/validate", {"steering": {"bundle": name}})


def until(condition: Callable[[], bool]) -> None:
    """`wait_for`, more closely, where the time is measured."""
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Stream:
    """A reply that is being read, in a thread of its own; `ended` is when its last event came."""

    def __init__(self, server: Server, steering: Any, **fields: Any) -> None:
        self.events: list[Any] = []
        self.ended = 0.0
        self.headers: dict[str, str] = {}
        self._document = {**LONG, **fields} | ({} if steering is None else {"steering": steering})
        self._url = f"{server.base_url}/v1/completions"
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_for(lambda: len(self.events) >= 3)

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._document, timeout=120) as response:
            self.headers = dict(response.headers)
            for line in response.iter_lines():
                if line:
                    text = line.removeprefix("data: ")
                    self.events.append(text if text == "[DONE]" else json.loads(text))
        self.ended = time.monotonic()

    def wait(self) -> Any:
        """The last event."""
        self._thread.join(120)
        assert self.ended, "the stream did not end"
        return self.events[-1]


def test_a_name_means_its_default_version_and_the_proof_says_which(server: Server, version: str) -> None:
    for steering, model in (
        ({"bundle": "tidy"}, MODEL),
        ({"bundle": version}, MODEL),
        (None, f"{MODEL}@tidy"),
        (None, f"{MODEL}@{version}"),
        (None, f"{MODEL}@{version}:0.5"),
    ):
        reply = ask(server, steering, model=model).json()
        assert (reply["steering"]["status"], reply["steering"]["bundles"]) == ("applied", [version])
    assert f"{MODEL}@{version}" in [card["id"] for card in httpx.get(f"{server.base_url}/v1/models").json()["data"]]


def test_a_draft_is_named_by_no_request(server: Server, registry: Registry, embedded_identity: ModelIdentity) -> None:
    bundle = random_bundle(embedded_identity, name="draft", layer=9, seed=next(_seeds))
    stored, _ = registry.upload(bundle.to_bytes(), actor=ME)
    time.sleep(0.5)
    reply = ask(server, {"bundle": stored.reference})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_bundle")
    assert "is a draft" in reply.json()["error"]["message"]


def test_a_revoked_version_stops_within_a_second_and_its_streams_end_with_an_error(
    server: Server, registry: Registry, version: str
) -> None:
    number = int(version.rpartition("v")[2])
    steered, plain = Stream(server, {"bundle": "tidy"}), Stream(server, None, max_tokens=100)
    start = time.monotonic()
    registry.revoke("tidy", number, actor=ME, reason="it is rude")
    until(lambda: validate(server, version).status_code == 410)
    refused_after = time.monotonic() - start
    error = steered.wait()["error"]
    assert (error["code"], "it is rude" in error["message"]) == ("bundle_revoked", True)
    assert "[DONE]" not in steered.events
    assert max(refused_after, steered.ended - start) < WITHIN
    assert plain.wait() == "[DONE]"
    assert ask(server, {"bundle": "tidy"}).status_code == 404  # no other version takes its place


def test_streams_finish_where_the_revocation_says_so(server: Server, registry: Registry, version: str) -> None:
    steered = Stream(server, {"bundle": version}, max_tokens=80)
    registry.revoke("tidy", int(version.rpartition("v")[2]), actor=ME, reason="replaced", running="finish")
    until(lambda: validate(server, version).status_code == 410)
    assert steered.wait() == "[DONE]"
    assert steered.events[-2]["steering"]["status"] == "applied"


def test_the_kill_switch_ends_steering_within_a_second(server: Server, switch: KillSwitch) -> None:
    before = metric(server, 'trimtab_requests_total{status="ended"}')
    steered, plain = Stream(server, {"bundle": "calm"}), Stream(server, None, max_tokens=100)
    start = time.monotonic()
    switch.throw("unsteered", actor=ME, reason="it is rude")
    until(lambda: httpx.get(f"{server.base_url}/admin/v1/kill").json()["mode"] == "unsteered")
    killed_after = time.monotonic() - start
    error = steered.wait()["error"]
    assert (error["code"], "it is rude" in error["message"]) == ("steering_killed", True)
    assert max(killed_after, steered.ended - start) < WITHIN
    reply = ask(server, {"bundle": "calm"})
    assert reply.json()["steering"] == {"status": "killed", "reason": "it is rude"}
    assert reply.json()["choices"] == ask(server, None).json()["choices"]
    assert ask(server, None).json()["steering"] == {"status": "not_requested"}
    assert ask(server, {"bundle": "calm", "strenght": 1}).status_code == 400  # what is wrong is still wrong
    assert plain.wait() == "[DONE]"
    assert metric(server, 'trimtab_requests_total{status="ended"}') == before + 1


def test_the_kill_switch_can_put_a_safe_default_in_place_or_refuse(
    server: Server, switch: KillSwitch, version: str
) -> None:
    switch.throw("fallback", actor=ME, reason="rude", fallback={"bundle": "tidy", "strength": 0.5})
    wait_for(lambda: httpx.get(f"{server.base_url}/admin/v1/kill").json()["mode"] == "fallback")
    reply = ask(server, {"bundle": "calm"}).json()
    assert (reply["steering"]["status"], reply["steering"]["bundles"]) == ("killed", [version])
    assert reply["steering"]["hook_points"].keys() == {"blocks.9.resid_post"}
    assert reply["steering"]["completion_tokens"] == 4
    assert ask(server, None).json()["steering"] == {"status": "not_requested"}
    httpx.post(f"{server.base_url}/admin/v1/kill", json={"mode": "refuse", "reason": "rude"})
    refused = ask(server, {"bundle": "calm"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "steering_killed")
    assert refused.headers["x-should-retry"] == "false"
    assert httpx.request("DELETE", f"{server.base_url}/admin/v1/kill").json()["mode"] == "off"
    assert ask(server, {"bundle": "calm"}).json()["steering"]["status"] == "applied"


def test_the_kill_switch_works_while_the_engine_hangs(server: Server, switch: KillSwitch) -> None:
    """Its processes are stopped, as if on a GPU that does not answer."""
    steered = Stream(server, {"bundle": "calm"})
    engine = [pid for pid in descendants(server.process.pid) if "EngineCore" in comm(pid)]
    assert engine
    for pid in engine:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(0.5)
        start = time.monotonic()
        switch.throw("unsteered", actor=ME, reason="the engine hangs")
        assert steered.wait()["error"]["code"] == "steering_killed"
        assert steered.ended - start < WITHIN
        assert httpx.get(f"{server.base_url}/admin/v1/kill", timeout=WITHIN).json()["mode"] == "unsteered"
        assert httpx.get(f"{server.base_url}/readyz", timeout=WITHIN).status_code == 200
    finally:
        for pid in engine:
            os.kill(pid, signal.SIGCONT)
    assert ask(server, {"bundle": "calm"}).json()["steering"]["status"] == "killed"


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/comm").read_text()


def test_default_steering_applies_to_who_does_not_say_and_can_be_left_out(server: Server, database: Database) -> None:
    url = f"{server.base_url}/admin/v1/defaults"
    try:
        assert httpx.put(f"{url}/fleet", json={"steering": {"bundle": "calm"}}).status_code == 200
        httpx.put(f"{url}/alias/half-calm", json={"steering": {"bundle": "calm", "strength": 0.5}})
        fleet, alias = ask(server, None).json(), ask(server, None, model="half-calm").json()
        assert (fleet["steering"]["status"], fleet["steering"]["source"]) == ("applied", "fleet")
        assert (alias["steering"]["status"], alias["steering"]["source"]) == ("applied", "alias")
        assert fleet["steering"]["plan"] != alias["steering"]["plan"]
        assert ask(server, {"opt_out": True}).json()["steering"] == {"status": "not_requested"}
        assert "source" not in ask(server, {"bundle": "calm"}).json()["steering"]
        assert len(httpx.get(url).json()["data"]) == 2
    finally:
        httpx.request("DELETE", f"{url}/fleet")
        httpx.request("DELETE", f"{url}/alias/half-calm")
    assert ask(server, None).json()["steering"] == {"status": "not_requested"}
    assert DefaultSteering(database).list() == ()


def test_the_registry_is_administered_over_http(server: Server, embedded_identity: ModelIdentity) -> None:
    url = f"{server.base_url}/admin/v1"
    bundle = random_bundle(embedded_identity, name="remote", layer=9, seed=next(_seeds))
    octets = {"content-type": "application/octet-stream"}
    made = httpx.post(f"{url}/bundles", content=bundle.to_bytes(), headers=octets)
    assert (made.status_code, made.json()["reference"], made.json()["created_by"]) == (201, "remote:v1", "anonymous")
    assert httpx.post(f"{url}/bundles", content=bundle.to_bytes(), headers=octets).status_code == 200
    assert httpx.get(f"{url}/bundles/remote:v1/file").content == bundle.to_bytes()
    assert httpx.post(f"{url}/bundles/remote:v1/default").status_code == 409
    promoted = httpx.post(f"{url}/bundles/remote:v1/promote", json={"default": True, "reason": "tested"}).json()
    assert (promoted["state"], promoted["is_default"]) == ("active", True)
    wait_for(lambda: ask(server, {"bundle": "remote"}, max_tokens=1).status_code == 200)
    assert httpx.post(f"{url}/bundles/remote:v1/revoke", json={}).status_code == 400  # no reason
    assert httpx.post(f"{url}/bundles/remote:v1/revoke", json={"reason": "x", "why": 1}).status_code == 400
    assert httpx.post(f"{url}/bundles/remote:v1/revoke", json={"reason": "over"}).json()["state"] == "revoked"
    assert ask(server, {"bundle": "remote:v1"}).status_code == 410  # this replica goes by it already
    assert httpx.get(f"{url}/bundles/remote:v2").status_code == 404
    actions = [entry["action"] for entry in httpx.get(f"{url}/audit").json()["data"] if entry["subject"] == "remote:v1"]
    assert actions == ["bundle.upload", "bundle.promote", "bundle.set_default", "bundle.revoke"]
