from typing import Any

import httpx
import openai

from tests.conftest import Server
from tests.e2e.test_generation import wait_for

MODEL = "smollm2-135m-instruct"


def get(server: Server, path: str) -> Any:
    response = httpx.get(server.base_url + path, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_models_are_the_model_and_its_aliases(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, f"{MODEL}@calm"]


def test_no_path_of_the_servers_disk_is_told(server: Server) -> None:
    for path in ("/v1/models", "/v1/steering/bundles", "/v1/steering/bundles/calm"):
        assert "/root" not in httpx.get(server.base_url + path).text
        assert str(server.log.parent) not in httpx.get(server.base_url + path).text


def test_the_bundles_are_listed_with_what_they_edit(server: Server) -> None:
    (listed,) = get(server, "/v1/steering/bundles")["data"]
    assert (listed["name"], listed["hook_point"]) == ("calm", "blocks.14.resid_post")
    assert (listed["n_latents"], listed["n_vectors"]) == (3, 1)
    assert listed["content_hash"] == server.bundle.content_hash


def test_a_bundle_shows_its_latents(server: Server) -> None:
    shown = get(server, "/v1/steering/bundles/calm")
    assert [latent["latent"] for latent in shown["latents"]] == [7, 8, 9]
    assert shown["content_hash"] == server.bundle.content_hash


def test_validation_gives_the_plan_that_a_generation_would_run(server: Server) -> None:
    steering = {"bundle": "calm", "strength": 0.5}
    valid = server.post("/v1/steering/validate", {"steering": steering}).json()
    reply = server.post(
        "/v1/completions", {"model": MODEL, "prompt": "hi", "max_tokens": 1, "steering": steering}
    ).json()
    assert valid["valid"] is True
    assert valid["plan"] == reply["steering"]["plan"]
    assert valid["hook_points"] == ["blocks.14.resid_post"]


def test_validation_takes_a_whole_request_and_refuses_as_a_generation_would(server: Server) -> None:
    ask = {"model": MODEL, "messages": [], "steering": {"bundle": "calm", "strenght": 1}}
    errors = [server.post(path, ask) for path in ("/v1/steering/validate", "/v1/chat/completions")]
    assert [error.status_code for error in errors] == [400, 400]
    assert errors[0].json() == errors[1].json()
    assert server.post("/v1/steering/validate", {"model": MODEL}).status_code == 400


def test_the_schema_names_every_field(server: Server) -> None:
    schema = get(server, "/v1/steering/schema")
    assert schema["properties"].keys() == {"bundle", "edits", "strength", "on_failure"}
    assert schema["additionalProperties"] is False


def test_the_workers_are_proven_again_on_demand_and_hold_nothing_of_requests_that_have_ended(server: Server) -> None:
    ask = {"model": MODEL, "prompt": "hi", "max_tokens": 1, "steering": {"bundle": "calm"}}
    assert server.post("/v1/completions", ask).status_code == 200

    def reports() -> list[Any]:
        return list(get(server, "/v1/steering/workers")["data"])

    wait_for(lambda: [(r["requests"], r["slots"], r["gates"]) for r in reports()] == [(0, 0, 0)])
    (report,) = reports()
    assert report["refusal"] is None
    assert server.bundle.content_hash in report["bundles"]


def test_probes(server: Server) -> None:
    """On a machine so busy that the database was silent for ten seconds a replica is `stale` for a moment, as it should be."""
    assert get(server, "/livez") == {"status": "live"}
    wait_for(lambda: httpx.get(f"{server.base_url}/readyz", timeout=60).json() == {"status": "ready"})
