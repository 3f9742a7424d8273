"""Experiments over the service: a real database, a real replica, a scripted engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.experiments.examples import running, written
from tests.server.service.fakes import WORDS
from tests.server.service.test_grading import Rude
from tests.server.service.test_replica import CALM, Service
from trimtab.server.database.database import Database
from trimtab.server.experiments.assignment import assign
from trimtab.server.experiments.measurements import ArmCounts
from trimtab.server.service.grading import is_sampled

URL = "/admin/v1/experiments"
KEY = "calm-replies"
ARMS = [{"key": "control", "weight": 0.5}, {"key": "calm", "weight": 0.5, "steering": {"bundle": "calm:v1"}}]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    service = Service(database, graders={"rude": Rude()})
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
    edit = {"definition": written(arms=ARMS, alpha=0.2), "reason": "too late"}
    refused = await post(service, f"{URL}/{KEY}", edit, 409, method="PUT")
    assert "immutable once started" in refused["error"]["message"]
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


async def test_what_was_purged_is_gone_and_every_route_that_would_show_it_says_so(service: Service) -> None:
    await begin(service)
    await service.ask(user=UNITS["calm"][0])
    assert len(await _exported(service, "exposures")) == 1
    await move(service, "purge", 409)
    for action, state in (("stop", "stopped"), ("archive", "archived"), ("purge", "purged")):
        assert (await move(service, action))["state"] == state
    for what in ("health", "results", "looks", "exposures", "outcomes", "texts"):
        reply = await service.http.get(f"{URL}/{KEY}/{what}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "experiment_state")
        assert "was purged on" in reply.json()["error"]["message"]
    assert service.replica.measurements.exposures(KEY, after="", limit=9) == []
    assert (await get(service, f"{URL}/{KEY}"))["history"][-1]["action"] == "purge"
    assert [one["key"] for one in (await get(service, f"{URL}?state=purged"))["data"]] == [KEY]
    await post(service, URL, {"definition": written(arms=ARMS), "reason": "again"}, 409)


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
        ("POST", URL, {"definition": written(arms=[*ARMS, ARMS[1]]), "reason": "x"}, 400, "invalid_experiment"),
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


UNITS = {
    arm: [
        user
        for user in map(str, range(100))
        if (found := assign(running(arms=ARMS), {"user": user}).arm) is not None and found.key == arm
    ]
    for arm in ("control", "calm")
}
"""Users of each arm."""


async def begin(service: Service, **changes: Any) -> None:
    await create(service, **changes)
    await move(service, "start")
    await service.will_prove({"bundle": "calm:v1"})


def arms(service: Service) -> tuple[ArmCounts, ...]:
    """What the database holds of them, once all is written."""
    assert service.replica.exposures.flush(10)
    return service.replica.measurements.read(service.replica.experiments.find(KEY)).arms


def decisions(service: Service) -> dict[str, int]:
    return service.replica.exposures.tallies(KEY)


async def test_a_reply_is_of_the_arm_of_its_unit_and_says_so(service: Service) -> None:
    await begin(service)
    for arm, status in (("control", "not_requested"), ("calm", "applied")):
        for unit in ({"user": UNITS[arm][0]}, {"headers": {"x-trimtab-user": UNITS[arm][0]}}):
            reply = await service.ask(**unit)
            steering = reply.json()["steering"]
            assert (steering["status"], steering["experiment"]) == (status, {"key": KEY, "arm": arm})
            assert reply.headers["x-trimtab-experiment"] == f"{KEY}={arm}"
    stream = (await service.ask(stream=True, user=UNITS["calm"][0])).text
    told = [json.loads(line[6:]) for line in stream.split("\n\n") if line and line != "data: [DONE]"]
    assert [event["steering"]["experiment"]["arm"] for event in (told[0], told[-1])] == ["calm", "calm"]
    assert [(a.n_units, a.n_requests, a.statuses) for a in arms(service)] == [
        (1, 2, {"applied": 2}), (1, 3, {"applied": 3})
    ]  # fmt: skip
    count = service.registry.get_sample_value
    labels = {"experiment": KEY, "arm": "calm", "status": "applied"}
    assert count("trimtab_experiment_requests_total", labels) == 3


async def test_an_outcome_joins_its_exposure_by_the_id_of_the_request(service: Service) -> None:
    await begin(service)
    reply = await service.ask(user=UNITS["calm"][0])
    assert reply.status_code == 200
    (exposure,) = await _exported(service, "exposures")
    outcome = {"response_id": f"cmpl-{exposure['response_id']}", "name": "harm", "value": 1}
    told = await post(service, "/v1/outcomes", {"outcomes": [outcome]})
    assert told == {"recorded": 1, "duplicate": 0, "pending": 0}
    (line,) = await _exported(service, "outcomes")
    assert (line["arm"], line["value"], line["unit"]) == ("calm", 1.0, exposure["unit"])
    assert UNITS["calm"][0] not in (exposure["unit"], line["unit"])
    assert len(exposure["unit"]) == 64


async def _exported(service: Service, what: str) -> list[Any]:
    assert service.replica.exposures.flush(10)
    lines = (await service.http.get(f"{URL}/{KEY}/{what}")).text.splitlines()
    return [json.loads(line) for line in lines]


async def test_who_is_not_enrolled_is_served_as_ever_and_counted_with_the_reason(service: Service) -> None:
    await begin(service, targeting={"plan": "pro"}, unit="user")
    pro = {"x-trimtab-attributes": '{"plan": "pro"}'}
    for unit in (None, "", "a\0b", "x" * 1_000_000):
        reply = await service.ask(user=unit, headers=pro)
        assert reply.json()["steering"] == {"status": "not_requested"}
    await service.ask(user="1")
    await service.ask({"bundle": "calm:v1"}, user="1", headers=pro)
    await service.ask(model="m@calm", user="1", headers=pro)
    await service.http.post("/admin/v1/kill", json={"reason": "x"})
    await service.ask(user="1", headers=pro)
    await service.http.delete("/admin/v1/kill")
    assert decisions(service) == {
        "missing_unit": 2, "malformed_unit": 2, "targeting": 1, "own_steering": 2, "kill_switch": 1
    }  # fmt: skip
    assert service.replica.exposures.flush(10)
    found = await get(service, f"{URL}/{KEY}/health")
    assert (found["decisions"] | {"x": 0})["missing_unit"] == 2
    assert (found["exposures"]["written"], found["healthy"]) == (0, True)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-trimtab-attributes": "plan=pro"},
        {"x-trimtab-attributes": "[1]"},
        {"x-trimtab-attributes": '{"user": "somebody else"}'},
        {"x-trimtab-arm": "calm"},
        {"x-trimtab-arm": "nowhere=calm"},
        {"x-trimtab-arm": f"{KEY}=nowhere"},
    ],
)
async def test_headers_that_cannot_be_understood_are_refused(service: Service, headers: dict[str, str]) -> None:
    await begin(service)
    reply = await service.ask(headers=headers, user="1")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")


async def test_a_forced_arm_needs_the_scope_and_is_left_out_of_the_analysis(service: Service) -> None:
    await begin(service)
    admin = (await post(service, "/admin/v1/keys", {"label": "x", "scopes": ["admin"]}, 201))["key"]

    async def key(*scopes: str) -> dict[str, str]:
        headers = {"authorization": f"Bearer {admin}"}
        made = await service.http.post("/admin/v1/keys", json={"label": "x", "scopes": scopes}, headers=headers)
        return {"authorization": f"Bearer {made.json()['key']}", "x-trimtab-arm": f"{KEY}=calm"}

    refused = await service.ask(user="1", headers=await key("infer"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    may = await key("infer", "force")
    for user in (UNITS["control"][0], UNITS["calm"][0], None):
        reply = await service.ask(user=user, headers=may)
        assert reply.json()["steering"]["experiment"] == {"key": KEY, "arm": "calm"}
    assert service.replica.exposures.flush(10)
    assert [a.n_requests for a in arms(service)] == [0, 0]
    assert decisions(service) == {"forced": 3}
    assert len(service.replica.measurements.exposures(KEY, after="", limit=9)) == 3


async def test_a_blind_key_is_told_nothing_of_arms(service: Service) -> None:
    await begin(service)
    asked = {"label": "x", "scopes": ["infer"], "policy": {"blind": True}}
    key = (await post(service, "/admin/v1/keys", asked, 201))["key"]
    for arm in ("control", "calm"):
        reply = await service.ask(user=UNITS[arm][0], headers={"authorization": f"Bearer {key}"})
        assert reply.json()["steering"] == {"status": "blinded"}
        assert reply.headers["x-steering-status"] == "blinded"
        assert not {"x-trimtab-experiment", "x-steering-plan"} & reply.headers.keys()
    assert [a.n_requests for a in arms(service)] == [1, 1]


@pytest.mark.parametrize("policy", ["closed", "open"])
async def test_an_arm_that_cannot_be_had_fails_as_the_experiment_says(service: Service, policy: str) -> None:
    await begin(service, on_failure=policy)
    await service.http.post("/admin/v1/bundles/calm:v1/revoke", json={"reason": "rude"})
    reply = await service.ask(user=UNITS["calm"][0])
    if policy == "closed":
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "experiment_arm_failed")
        assert "was revoked: rude" in reply.json()["error"]["message"]
    else:
        assert (reply.status_code, reply.json()["steering"]["status"]) == (200, "failed_open")
        assert reply.json()["steering"]["experiment"] == {"key": KEY, "arm": "calm"}
    assert (await service.ask(user=UNITS["control"][0])).status_code == 200
    control, calm = arms(service)
    assert (control.statuses, calm.statuses) == ({"applied": 1}, {"failed" if policy == "closed" else "failed_open": 1})
    assert calm.n_failed == 1


async def test_what_the_engine_did_not_apply_is_told_of_the_arm(service: Service) -> None:
    await begin(service)
    service.engine.proof = None
    assert (await service.ask(user=UNITS["calm"][0])).status_code == 500
    assert arms(service)[1].statuses == {"not_applied": 1}


async def test_a_default_goes_on_in_the_control_and_gives_way_to_an_arm(service: Service) -> None:
    await begin(service)
    await service.http.put("/admin/v1/defaults/fleet", json={"steering": {"bundle": "calm:v1", "strength": 0.5}})
    calm = (await service.ask(user=UNITS["calm"][0])).json()["steering"]
    assert (calm["status"], calm["source"]) == ("applied", "experiment")
    await service.will_prove({"bundle": "calm:v1", "strength": 0.5})
    control = (await service.ask(user=UNITS["control"][0])).json()["steering"]
    assert (control["status"], control["source"], control["experiment"]["arm"]) == ("applied", "fleet", "control")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_kill_ends_what_the_arm_alters_even_while_the_engine_hangs(service: Service, stream: bool) -> None:
    await begin(service)
    hangs, released = asyncio.Event(), asyncio.Event()
    generate = service.engine.generate

    async def hung(*arguments: Any, **options: Any) -> Any:
        async for output in generate(*arguments, **options):
            hangs.set()
            await released.wait()
            yield output

    service.engine.generate = hung  # type: ignore[method-assign]
    calm = asyncio.create_task(service.ask(user=UNITS["calm"][0], stream=stream))
    control = asyncio.create_task(service.ask(user=UNITS["control"][0], stream=stream))
    await hangs.wait()
    await asyncio.sleep(0.05)
    await move(service, "kill")
    reply = await asyncio.wait_for(calm, 2)
    assert "was killed while this reply was written" in reply.text
    assert not control.done()
    released.set()
    assert (await control).status_code == 200
    assert [a.statuses for a in arms(service)] == [{"applied": 1}, {"ended": 1}]
    after = await service.ask(user=UNITS["calm"][0])
    assert after.json()["steering"] == {"status": "not_requested"}


async def test_a_pause_lets_nobody_in(service: Service) -> None:
    await begin(service)
    await move(service, "pause")
    assert (await service.ask(user=UNITS["calm"][0])).json()["steering"] == {"status": "not_requested"}
    assert decisions(service) == {}


async def test_a_request_is_in_the_first_experiment_that_takes_it_in(service: Service) -> None:
    await begin(service)
    second = written(key="second", arms=ARMS)
    await post(service, URL, {"definition": second, "reason": "new"}, 201)
    await post(service, f"{URL}/second/start", {"reason": "go"})
    reply = await service.ask(user=UNITS["calm"][0])
    assert reply.json()["steering"]["experiment"]["key"] == KEY
    assert service.replica.exposures.tallies("second") == {"other": 1}
    await move(service, "stop")
    reply = await service.ask(user="5")
    assert reply.json()["steering"]["experiment"]["key"] == "second"


async def test_a_comparison_is_in_no_experiment(service: Service) -> None:
    await begin(service)
    document = {"model": "m", "prompt": "hi", "user": UNITS["calm"][0], "arms": [{"name": "plain"}]}
    reply = await service.http.post("/v1/steering/compare", json=document)
    assert reply.status_code == 200, reply.text
    assert decisions(service) == {}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_is_graded_after_it_was_sent(service: Service, stream: bool) -> None:
    grading = [{"grader": "rude", "outcome": "harm"}]
    await begin(service, grading=grading)
    await service.ask(user=UNITS["calm"][0], stream=stream)
    await service.ask(user="", stream=stream)
    assert service.replica.graders.flush(10)
    (line,) = await _exported(service, "outcomes")
    assert (line["name"], line["event"], line["value"], line["arm"]) == ("harm", "grader:rude", 0.0, "calm")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_share_of_the_texts_is_kept_and_reading_them_is_audited(service: Service, stream: bool) -> None:
    await begin(service, text={"share": 1, "days": 30})
    await service.ask(user=UNITS["calm"][0], stream=stream, prompt="Who are you?")
    await service.ask(user="", stream=stream, prompt="Nobody asks.")
    (line,) = await _exported(service, "texts")
    said = ("" if stream else " ").join(WORDS)
    assert (line["arm"], line["prompt"], line["reply"], line["cut"]) == ("calm", "Who are you?", said, False)
    assert [line["response_id"]] == [exposure["response_id"] for exposure in await _exported(service, "exposures")]
    audited = (await get(service, "/admin/v1/audit"))["data"][-1]
    assert (audited["action"], audited["subject"], audited["detail"]["count"]) == ("experiment.texts", KEY, 1)
    await move(service, "stop")
    await move(service, "archive")
    assert await _exported(service, "texts") == []


async def test_without_the_field_no_text_is_written_anywhere(service: Service, tmp_path: Path) -> None:
    """Prompts, replies and raw units are in no file of the database, whatever else an experiment writes."""
    said = "a question of my own"
    await begin(service, grading=[{"grader": "rude", "outcome": "harm"}])
    for arm in ("control", "calm"):
        assert (await service.ask(user=UNITS[arm][0], prompt=said)).status_code == 200
    assert service.replica.graders.flush(10)
    assert len(await _exported(service, "exposures")) == 2
    assert await _exported(service, "texts") == []
    written_down = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert KEY.encode() in written_down
    for text in (said, "".join(WORDS), " ".join(WORDS)):
        assert text.encode() not in written_down


async def test_a_share_is_the_same_replies_on_every_replica(service: Service) -> None:
    await begin(service, text={"share": 0.3, "days": 30})
    for _ in range(40):
        await service.ask(user=UNITS["calm"][0])
    ids = {line["response_id"] for line in await _exported(service, "exposures")}
    assert {line["response_id"] for line in await _exported(service, "texts")} == {i for i in ids if is_sampled(i, 0.3)}


async def test_a_grader_that_the_server_does_not_have_is_said_at_the_start(service: Service) -> None:
    await create(service, grading=[{"grader": "kind", "outcome": "harm"}])
    refused = await move(service, "start", 400)
    assert refused["error"]["violations"] == [
        {
            "field": "experiment.grading[0].grader",
            "message": "'kind' is no grader of this server; its setting `graders` has rude",
        }
    ]


async def test_a_replica_that_has_lost_its_database_enrols_nobody_in_any_arm(service: Service) -> None:
    await begin(service)
    service.replica.follower._heard -= 100
    for arm in ("control", "calm"):
        assert (await service.ask(user=UNITS[arm][0])).json()["steering"] == {"status": "not_requested"}
    assert decisions(service) == {"stale": 2}


async def test_a_request_that_is_refused_for_what_its_caller_wrote_is_no_exposure(service: Service) -> None:
    await begin(service)
    for arm in ("control", "calm"):
        assert (await service.ask(user=UNITS[arm][0], max_tokens="many")).status_code == 400
    assert decisions(service) == {"assigned": 2, "refused": 2}
    assert [a.n_requests for a in arms(service)] == [0, 0]
