"""Experiments over the service: a real database, a real replica, a scripted engine."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.experiments.examples import written
from tests.server.service.test_replica import CALM, Service
from trimtab.server.database.database import Database

URL = "/admin/v1/experiments"
KEY = "calm-replies"
ARMS = [{"key": "control", "weight": 0.5}, {"key": "calm", "weight": 0.5, "steering": {"bundle": "calm:v1"}}]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    service = Service(database)
    await service.replica.start()
    await service.publish(CALM)
    yield service
    await service.http.aclose()
    await service.replica.close()


async def post(service: Service, path: str, document: Any, status: int = 200, method: str = "POST") -> Any:
    reply = await service.http.request(method, path, json=document)
    assert reply.status_code == status, reply.text
    return reply.json()


async def create(service: Service, **changes: Any) -> Any:
    definition = written(**({"arms": ARMS} | changes))
    return await post(service, URL, {"definition": definition, "reason": "new"}, 201)


async def move(service: Service, action: str, status: int = 200, **more: Any) -> Any:
    return await post(service, f"{URL}/{KEY}/{action}", {"reason": "because", **more}, status)


async def get(service: Service, path: str) -> Any:
    reply = await service.http.get(path)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_an_experiment_lives_from_draft_to_archive_over_http(service: Service) -> None:
    made = await create(service)
    assert (made["state"], made["coverage"], made["revision"]) == ("draft", 0.0, 1)
    await post(service, f"{URL}/{KEY}", {"definition": written(arms=ARMS, alpha=0.1), "reason": "typo"}, method="PUT")
    started = await move(service, "start")
    assert started["plans"].keys() == {"calm"}
    assert (await move(service, "ramp", coverage=0.5))["coverage"] == 0.5
    for action, state in (("pause", "paused"), ("resume", "running"), ("kill", "stopped"), ("archive", "archived")):
        assert (await move(service, action))["state"] == state
    shown = await get(service, f"{URL}/{KEY}")
    assert [entry["action"] for entry in shown["history"]] == [
        "create", "edit", "start", "ramp", "pause", "resume", "kill", "archive"
    ]  # fmt: skip
    listed = await get(service, f"{URL}?state=archived")
    assert [one["key"] for one in listed["data"]] == [KEY]
    assert {entry["actor"] for entry in shown["history"]} == {"anonymous"}


async def test_an_arm_names_a_version_whose_meaning_cannot_change(service: Service) -> None:
    arms = [ARMS[0], {**ARMS[1], "steering": {"bundle": "calm"}}]
    await create(service, arms=arms)
    refused = await move(service, "start", 400)
    assert refused["error"]["violations"] == [
        {
            "field": "experiment.arms[1].steering",
            "message": "'calm' means another version once its default changes; name calm:v1",
        }
    ]


async def test_an_experiment_whose_arm_cannot_be_had_does_not_start(service: Service) -> None:
    edits = {"edits": [{"bundle": "calm:v1", "latent": 99, "operation": "ablate"}]}
    await create(service, arms=[ARMS[0], {**ARMS[1], "steering": edits}])
    refused = await move(service, "start", 400)
    assert refused["error"]["param"] == "experiment.arms[1].steering.edits[0].latent"
    assert (await get(service, f"{URL}/{KEY}"))["state"] == "draft"


@pytest.mark.parametrize(
    ("method", "path", "document", "status", "code"),
    [
        ("POST", URL, {"definition": written(arms=ARMS[:1]), "reason": "x"}, 400, "invalid_experiment"),
        ("POST", URL, {"definition": written(colour="red"), "reason": "x"}, 400, "invalid_experiment"),
        ("POST", URL, {"definition": written(arms=ARMS), "reason": "x"}, 409, "conflict"),
        ("POST", URL, {"definition": written(arms=ARMS)}, 400, "invalid_request"),
        ("POST", f"{URL}/nowhere/start", {"reason": "x"}, 404, "unknown_experiment"),
        ("POST", f"{URL}/{KEY}/start", {"reason": " "}, 400, "invalid_request"),
        ("POST", f"{URL}/{KEY}/start", {"reason": "x", "revision": 9}, 409, "stale_revision"),
        ("POST", f"{URL}/{KEY}/pause", {"reason": "x"}, 409, "experiment_state"),
        ("POST", f"{URL}/{KEY}/ramp", {"reason": "x"}, 400, "invalid_request"),
        ("POST", f"{URL}/{KEY}/rollback", {"reason": "x"}, 404, "not_found"),
        ("GET", f"{URL}?state=lost", None, 400, "invalid_request"),
        ("GET", f"{URL}/nowhere/results", None, 404, "unknown_experiment"),
        ("GET", f"{URL}/{KEY}/exposures?limit=-1", None, 400, "invalid_request"),
        ("PUT", "/admin/v1/holdout", {"share": 2, "reason": "x"}, 400, "invalid_request"),
        (
            "POST",
            "/v1/outcomes",
            {"outcomes": [{"response_id": "x", "name": "harm", "value": 1}]},
            400,
            "invalid_request",
        ),
        ("POST", "/v1/outcomes", {"outcomes": {}}, 400, "invalid_request"),
    ],
)
async def test_what_cannot_be_done_is_said(
    service: Service, method: str, path: str, document: Any, status: int, code: str
) -> None:
    await create(service)
    reply = await service.http.request(method, path, json=document)
    if status == 404 and code == "not_found":
        assert reply.status_code == 404  # no such route, here without the edge in front
        return
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.json()["error"]["message"]


async def test_health_and_results_of_nobody_yet_are_whole_documents(service: Service) -> None:
    await create(service)
    await move(service, "start")
    found = await get(service, f"{URL}/{KEY}/health")
    assert (found["healthy"], found["problems"], found["next_step"]) == (True, [], None)
    assert found["exposures"] == {"written": 0, "dropped": 0, "waiting": 0, "last_at": None}
    found = await get(service, f"{URL}/{KEY}/results")
    assert (found["units"], found["verdicts"]) == ({"control": 0, "calm": 0}, {"calm": "collecting"})
    assert found["effects"][0]["low"] is None
    json.dumps(found, allow_nan=False)


async def test_the_holdout_is_shown_and_set(service: Service) -> None:
    assert await get(service, "/admin/v1/holdout") == {"share": 0.0}
    await post(service, "/admin/v1/holdout", {"share": 0.1, "reason": "x"}, method="PUT")
    assert await get(service, "/admin/v1/holdout") == {"share": 0.1}
    assert service.replica.catalogue.snapshot.holdout == 0.1
