"""What a caller gets when the engine did not do what the plan says, and when it fails outright."""

import json
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient
from vllm.v1.engine.exceptions import EngineDeadError

from tests.bundles import random_bundle
from tests.server.service.fakes import N_PROMPT, WORDS, NoReplica, ScriptedEngine, ScriptedServing, gate
from trimtab.server.plan import compile_plan
from trimtab.server.service.app import build
from trimtab.server.service.generation import Generation
from trimtab.server.service.metrics import Metrics
from trimtab.server.steering import parse_steering

BUNDLES = {"calm": random_bundle()}
STEERING = {"edits": [{"bundle": "calm", "latent": 7, "operation": "add", "amount": 1.0}]}
PLAN = compile_plan(parse_steering(STEERING), BUNDLES)
ASK = {"model": "m", "prompt": "hi", "steering": STEERING}


def proof(completion_tokens: int = len(WORDS)) -> dict[str, Any]:
    counts = {"prompt_tokens": N_PROMPT - 2, "completion_tokens": completion_tokens, "cached_prompt_tokens": 0}
    points = {
        "blocks.1.resid_post": {
            **counts,
            "gate_firings": 0,
            "special_tokens": 0,
            "max_relative_norm": 0.5,
            "mean_relative_norm": 0.25,
        }
    }
    return {"plan": PLAN.hash, "samples": 1, "failure": None, "hook_points": points}


class Service:
    """The app over a scripted engine."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.registry = CollectorRegistry()
        serving = cast(Any, ScriptedServing(engine))
        generation = Generation(
            engine=cast(Any, engine),
            chat=serving,
            completion=serving,
            responses=serving,
            models=("m",),
            bundles=BUNDLES,
            on_failure="closed",
            metrics=Metrics(self.registry),
            keep_alive_seconds=0.0,
        )
        none = cast(Any, None)
        app = build(generation, none, none, none, self.registry, cast(Any, NoReplica()), gate())
        self.http = TestClient(app, raise_server_exceptions=False)

    def post(self, **changes: Any) -> Any:
        return self.http.post("/v1/completions", json={**ASK, **changes})

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_what_is_proven_is_applied_and_counted() -> None:
    service = Service(ScriptedEngine(proof()))
    reply = service.post()
    assert (reply.status_code, reply.json()["steering"]["status"]) == (200, "applied")
    assert "kv_transfer_params" not in reply.json()
    assert service.count("trimtab_edited_tokens_total", scope="completion") == 3
    assert service.count("trimtab_requests_total", status="applied") == 1


@pytest.mark.parametrize("engine_says", [None, proof(completion_tokens=2), {**proof(), "plan": "sha256:0"}])
def test_a_reply_that_was_not_steered_as_asked_is_withheld(engine_says: dict[str, Any] | None) -> None:
    service = Service(ScriptedEngine(engine_says))
    reply = service.post()
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "steering_not_applied")
    assert reply.headers["x-should-retry"] == "false"
    assert "so it goes" not in reply.text
    assert service.count("trimtab_steering_mismatch_total") == 1
    assert service.count("trimtab_requests_total", status="not_applied") == 1


def test_a_caller_who_asks_for_it_gets_the_reply_and_is_told() -> None:
    service = Service(ScriptedEngine(None))
    reply = service.post(steering={**STEERING, "on_failure": "open"})
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["text"] == "so it goes"
    assert reply.json()["steering"]["status"] == reply.headers["x-steering-status"] == "failed_open"
    assert "no proof" in reply.json()["steering"]["reason"]
    assert service.count("trimtab_steering_mismatch_total") == 1
    assert service.count("trimtab_requests_total", status="failed_open") == 1


def test_a_stream_that_was_not_steered_as_asked_never_finishes() -> None:
    service = Service(ScriptedEngine(proof(completion_tokens=2)))
    told = events(service.post(stream=True).text)
    assert [event["choices"][0]["text"] for event in told[:2]] == ["so", "it"]
    assert told[2]["error"]["code"] == "steering_not_applied"
    assert len(told) == 3
    assert service.count("trimtab_requests_total", status="not_applied") == 1


FAILED = {**proof(), "failure": "no slot was free"}


def test_a_failure_in_the_worker_ends_the_request_before_another_token() -> None:
    service = Service(ScriptedEngine(FAILED))
    assert service.post().json()["error"]["code"] == "steering_not_applied"
    told = events(service.post(stream=True).text)
    assert [event["error"]["code"] for event in told] == ["steering_not_applied"]
    assert service.count("trimtab_steering_mismatch_total") == 2
    assert service.count("trimtab_requests_total", status="not_applied") == 2


def test_a_failure_in_the_worker_is_told_at_the_end_to_those_open_to_it() -> None:
    reply = Service(ScriptedEngine(FAILED)).post(steering={**STEERING, "on_failure": "open"})
    assert reply.json()["steering"]["status"] == "failed_open"
    assert "no slot was free" in reply.json()["steering"]["reason"]


def test_a_stream_open_to_failure_says_so_at_its_end() -> None:
    told = events(Service(ScriptedEngine(None)).post(stream=True, steering={**STEERING, "on_failure": "open"}).text)
    assert told[-1] == "[DONE]"
    assert told[-2]["steering"]["status"] == "failed_open"


def test_a_request_without_steering_asks_for_no_proof() -> None:
    service = Service(ScriptedEngine(None))
    reply = service.http.post("/v1/completions", json={"model": "m", "prompt": "hi"})
    assert reply.json()["steering"] == {"status": "not_requested"}
    assert service.count("trimtab_steering_mismatch_total") == 0


def test_a_dead_engine_is_a_503_that_says_when_to_come_back() -> None:
    service = Service(ScriptedEngine(error=EngineDeadError()))
    reply = service.post()
    assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "engine_dead", "5")
    assert service.count("trimtab_requests_total", status="failed") == 1


def test_an_error_of_the_server_tells_callers_nothing_of_its_insides() -> None:
    reply = Service(ScriptedEngine(error=RuntimeError("secret path /srv/keys"))).post()
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in reply.text
    assert "RuntimeError" in reply.text


def test_readiness_follows_the_engine() -> None:
    engine = ScriptedEngine()
    service = Service(engine)
    assert service.http.get("/readyz").status_code == 200
    engine.errored = True
    assert service.http.get("/readyz").status_code == 503
    assert service.http.get("/livez").status_code == 200
