"""The service over a real database and a scripted engine: what a replica does with the state that it is told."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from tests.bundles import random_bundle
from tests.server.service.fakes import N_PROMPT, WORDS, ScriptedEngine, ScriptedServing
from trimtab.attribution.bundle import Bundle
from trimtab.server.database.database import Database
from trimtab.server.keys.access import ROUTES
from trimtab.server.keys.secret import Secret
from trimtab.server.service import current
from trimtab.server.service.app import build
from trimtab.server.service.flights import Flights
from trimtab.server.service.gate import Drain, Gate
from trimtab.server.service.generation import Generation
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.replica import Replica

CALM, SAFE = random_bundle(), random_bundle(name="safe", seed=3)
OCTETS = {"content-type": "application/octet-stream"}


class PlainShelf(dict[str, Bundle]):
    """A shelf without an engine to load into; the real one is tested end to end."""

    async def hold(self, reference: str, bundle: Bundle) -> None:
        """Names it."""
        self[reference] = bundle

    def withdraw(self, reference: str) -> None:
        """The name is gone."""
        del self[reference]

    def is_pinned(self, _: str) -> bool:
        """All are the registry's."""
        return True


class Service:
    """The app of one replica."""

    def __init__(self, database: Database, **options: Any) -> None:
        self.engine = ScriptedEngine()
        self.registry = CollectorRegistry()
        self.replica = Replica(
            database, cast(Any, PlainShelf()), Flights(), fingerprint="sha256:tiny", secret=Secret("s" * 32), **options
        )
        self.gate = Gate(self.replica.guard, self.replica.limits, Drain())
        serving = cast(Any, ScriptedServing(self.engine))
        metrics = Metrics(self.registry)
        self.generation = Generation(
            engine=cast(Any, self.engine),
            chat=serving,
            completion=serving,
            responses=serving,
            models=("m",),
            bundles=self.replica.catalogue,
            on_failure="closed",
            metrics=metrics,
            keep_alive_seconds=0.0,
            rules=lambda: self.replica.rules(current.caller.get()),
            flights=self.replica.flights,
            experiments=self.replica.enroller(metrics),
        )
        none = cast(Any, None)
        self.app = build(self.generation, none, none, none, self.registry, self.replica, self.gate)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://test")

    async def publish(self, bundle: Bundle) -> str:
        """A new version, active and the default."""
        made = (await self.http.post("/admin/v1/bundles", content=bundle.to_bytes(), headers=OCTETS)).json()
        reference = str(made["reference"])
        await self.http.post(f"/admin/v1/bundles/{reference}/promote", json={"default": True})
        while reference not in self.replica.catalogue:
            await asyncio.sleep(0.01)
        return reference

    async def will_prove(self, steering: Any) -> None:
        """The engine proves the plan of this steering from now on."""
        plan = (await self.http.post("/v1/steering/validate", json={"steering": steering})).json()
        prompt = N_PROMPT - 2
        point = {
            "prompt_tokens": prompt, "completion_tokens": len(WORDS), "cached_prompt_tokens": 0, "gate_firings": 0,
            "special_tokens": 0, "max_relative_norm": 0.5, "mean_relative_norm": 0.25,
        }  # fmt: skip
        points = dict.fromkeys(plan["hook_points"], point)
        self.engine.proof = {"plan": plan["plan"], "samples": 1, "failure": None, "hook_points": points}

    async def ask(self, steering: Any = None, headers: Any = None, **fields: Any) -> httpx.Response:
        """The reply to a completion."""
        document = {"model": "m", "prompt": "hi", **fields}
        return await self.http.post(
            "/v1/completions",
            json=document if steering is None else {**document, "steering": steering},
            headers=headers,
        )


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    service = Service(database)
    await service.replica.start()
    yield service
    await service.http.aclose()
    await service.replica.close()


async def test_the_proof_says_which_version_a_name_meant(service: Service) -> None:
    reference = await service.publish(CALM)
    await service.will_prove({"bundle": "calm"})
    for steering, model in (
        ({"bundle": "calm"}, "m"),
        ({"bundle": reference}, "m"),
        (None, "m@calm"),
        (None, f"m@{reference}"),
    ):
        reply = (await service.ask(steering, model=model)).json()
        assert (reply["steering"]["status"], reply["steering"]["bundles"]) == ("applied", ["calm:v1"])
    await service.will_prove({"bundle": "calm", "strength": 0.5})
    assert (await service.ask(model="m@calm:v1:0.5")).json()["steering"]["status"] == "applied"


async def test_what_was_revoked_is_gone_and_no_other_version_takes_its_place(service: Service) -> None:
    reference = await service.publish(CALM)
    await service.publish(random_bundle(seed=1))
    await service.http.post("/admin/v1/bundles/calm:v2/revoke", json={"reason": "rude"})
    replies = [await service.ask({"bundle": name}) for name in ("calm:v2", "calm")]
    assert [reply.status_code for reply in replies] == [410, 404]
    assert f"name one: {reference}" in replies[1].json()["error"]["message"]
    assert replies[0].json()["error"]["param"] == "steering.bundle"


async def test_each_mode_of_the_kill_switch(service: Service) -> None:
    for bundle in (CALM, SAFE):
        await service.publish(bundle)
    await service.http.post("/admin/v1/kill", json={"reason": "rude"})
    reply = await service.ask({"bundle": "calm"})
    assert reply.json()["steering"] == {"status": "killed", "reason": "rude"}
    assert reply.headers["x-steering-status"] == "killed"
    assert (await service.ask()).json()["steering"] == {"status": "not_requested"}
    assert (await service.ask({"bundle": "calm", "strenght": 1})).status_code == 400
    stream = (await service.ask({"bundle": "calm"}, stream=True)).text
    told = [json.loads(line[6:]) for line in stream.split("\n\n") if line and line != "data: [DONE]"]
    assert [event["steering"]["status"] for event in (told[0], told[-1])] == ["killed", "killed"]

    fallback = {"bundle": "safe", "strength": 0.5}
    await service.will_prove(fallback)
    thrown = await service.http.post(
        "/admin/v1/kill", json={"mode": "fallback", "fallback": fallback, "reason": "rude"}
    )
    assert thrown.json()["fallback"] == fallback
    reply = await service.ask({"bundle": "calm"})
    assert (reply.json()["steering"]["status"], reply.json()["steering"]["bundles"]) == ("killed", ["safe:v1"])
    assert reply.json()["steering"]["completion_tokens"] == len(WORDS)

    await service.http.post("/admin/v1/kill", json={"mode": "refuse", "reason": "rude"})
    reply = await service.ask({"bundle": "calm"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "steering_killed")
    assert reply.headers["x-should-retry"] == "false"
    assert (await service.ask()).status_code == 200
    assert (await service.http.delete("/admin/v1/kill")).json()["mode"] == "off"
    await service.will_prove({"bundle": "calm"})
    assert (await service.ask({"bundle": "calm"})).json()["steering"]["status"] == "applied"
    count = service.registry.get_sample_value
    assert count("trimtab_requests_total", {"status": "killed"}) == 3
    assert count("trimtab_steering_mismatch_total") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_steered_requests_that_wait_for_a_hung_engine_end_and_unsteered_ones_go_on(
    service: Service, stream: bool
) -> None:
    await service.publish(CALM)
    await service.will_prove({"bundle": "calm"})
    hangs, released = asyncio.Event(), asyncio.Event()
    generate = service.engine.generate

    async def hung(*arguments: Any, **options: Any) -> Any:
        async for output in generate(*arguments, **options):
            hangs.set()
            await released.wait()
            yield output

    service.engine.generate = hung  # type: ignore[method-assign]
    steered = asyncio.create_task(service.ask({"bundle": "calm"}, stream=stream))
    plain = asyncio.create_task(service.ask(stream=stream))
    await hangs.wait()
    await asyncio.sleep(0.05)
    await service.http.post("/admin/v1/kill", json={"reason": "it hangs"})
    reply = await asyncio.wait_for(steered, 2)
    assert "steering was switched off while this reply was written: it hangs" in reply.text
    assert "[DONE]" not in reply.text
    assert reply.status_code == (200 if stream else 503)
    assert not plain.done()
    released.set()
    assert (await plain).status_code == 200
    assert service.registry.get_sample_value("trimtab_requests_total", {"status": "ended"}) == 1
    assert len(service.replica.flights) <= 1


async def test_the_default_that_counts_steers_and_can_be_left_out(service: Service) -> None:
    await service.publish(CALM)
    await service.will_prove({"bundle": "calm"})
    url = "/admin/v1/defaults"
    assert (await service.http.put(f"{url}/fleet", json={"steering": {"bundle": "calm"}})).status_code == 200
    await service.http.put(f"{url}/alias/half", json={"steering": {"bundle": "calm", "strength": 0.5}})
    reply = (await service.ask()).json()["steering"]
    assert (reply["status"], reply["source"], reply["bundles"]) == ("applied", "fleet", ["calm:v1"])
    assert (await service.ask({"opt_out": True})).json()["steering"] == {"status": "not_requested"}
    assert "source" not in (await service.ask({"bundle": "calm"})).json()["steering"]
    await service.will_prove({"bundle": "calm", "strength": 0.5})
    assert (await service.ask(model="half")).json()["steering"]["source"] == "alias"
    assert len((await service.http.get(url)).json()["data"]) == 2
    await service.http.post("/admin/v1/bundles/calm:v1/revoke", json={"reason": "rude"})
    failed = await service.ask()
    assert failed.status_code == 404  # the default is not dropped silently
    assert "default steering of the fleet cannot be applied" in failed.json()["error"]["message"]
    for path in (f"{url}/fleet", f"{url}/alias/half"):
        assert (await service.http.delete(path)).status_code == 200
    assert (await service.ask()).json()["steering"] == {"status": "not_requested"}


@pytest.mark.parametrize(
    ("method", "path", "document", "status"),
    [
        ("POST", "/admin/v1/bundles/calm:v9/promote", {}, 404),
        ("POST", "/admin/v1/bundles/calm/promote", {}, 400),
        ("POST", "/admin/v1/bundles/calm:v1/revoke", {}, 400),
        ("POST", "/admin/v1/bundles/calm:v1/revoke", {"reason": "x", "why": 1}, 400),
        ("POST", "/admin/v1/bundles/calm:v1/promote", {"default": "yes please"}, 400),
        ("POST", "/admin/v1/keys", {"label": "x", "scopes": ["root"]}, 400),
        ("POST", "/admin/v1/keys", {"label": "x", "scopes": ["infer"], "expires_at": "tomorrow"}, 400),
        ("POST", "/admin/v1/keys/nowhere/rotate", {}, 404),
        ("PUT", "/admin/v1/defaults/tenant/x", {"steering": {"bundle": "calm"}}, 400),
        ("PUT", "/admin/v1/defaults/fleet", {"steering": {"bundel": "calm"}}, 400),
        ("DELETE", "/admin/v1/defaults/fleet", None, 404),
        ("POST", "/admin/v1/kill", {"mode": "fallback", "reason": "x"}, 400),
        ("GET", "/admin/v1/audit?after=-1", None, 400),
        ("GET", "/admin/v1/audit?limit=1e9", None, 400),
    ],
)
async def test_what_cannot_be_done_is_said(
    service: Service, method: str, path: str, document: Any, status: int
) -> None:
    await service.publish(CALM)
    reply = await service.http.request(method, path, json=document)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


async def test_from_the_first_key_on_one_is_asked_for(service: Service) -> None:
    assert (await service.http.get("/admin/v1/keys")).status_code == 200
    made = (await service.http.post("/admin/v1/keys", json={"label": "x", "scopes": ["admin"]})).json()
    assert (await service.http.get("/admin/v1/keys")).status_code == 401
    headers = {"authorization": f"Bearer {made['key']}"}
    (listed,) = (await service.http.get("/admin/v1/keys", headers=headers)).json()["data"]
    assert listed.keys() & {"digest", "key"} == set()
    entries = (await service.http.get("/admin/v1/audit", headers=headers)).json()["data"]
    assert [(entry["action"], entry["actor"]) for entry in entries] == [("key.create", "anonymous")]
    assert (await service.ask()).status_code == 401


async def test_a_bound_key_cannot_leave_a_default_out(service: Service) -> None:
    await service.publish(CALM)
    await service.will_prove({"bundle": "calm"})
    await service.http.put("/admin/v1/defaults/fleet", json={"steering": {"bundle": "calm"}})
    made = (await service.http.post("/admin/v1/keys", json={"label": "x", "scopes": ["infer"]})).json()
    service.http.headers["authorization"] = f"Bearer {made['key']}"
    for steering in ({"opt_out": True}, {"bundle": "calm"}):
        refused = await service.ask(steering)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert (await service.ask()).json()["steering"]["status"] == "applied"


async def test_the_table_of_routes_has_every_route_of_the_app_and_no_other(service: Service) -> None:
    served = {
        (method, route.path)
        for route in service.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == {route for route in ROUTES if route[0] != "GRPC"}


async def test_the_table_of_routes_has_every_method_of_our_services_and_no_other() -> None:
    from trimtab.v1 import experiment_service_pb2, inference_pb2, registry_service_pb2, steering_service_pb2

    services = (
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        steering_service_pb2.DESCRIPTOR.services_by_name["SteeringService"],
        experiment_service_pb2.DESCRIPTOR.services_by_name["ExperimentService"],
        registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"],
    )
    ours = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert ours == {path for method, path in ROUTES if method == "GRPC" and path.startswith("/trimtab.")}
