"""Experiments on the real server: arms are what they say, kills reach streams within a second, no measurement is lost."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import grpc
import httpx
import pytest
import sqlalchemy as sa

from tests.conftest import Server
from tests.e2e.test_generation import metric, wait_for
from tests.e2e.test_operations import LONG, ME, MODEL, Stream, comm
from tests.processes import WITHIN, descendants
from trimtab.server.database.database import Database
from trimtab.server.database.schema import sampled_text
from trimtab.server.experiments.assignment import assign
from trimtab.server.experiments.store import Experiments
from trimtab.v1 import experiment_service_pb2, inference_pb2
from trimtab.v1.experiment_service_pb2_grpc import ExperimentServiceStub
from trimtab.v1.inference_pb2_grpc import InferenceServiceStub

PROMPT = "The sea is"
PRIMARY = {"key": "harm", "outcome": "harm", "direction": "decrease"}
CALM = {"bundle": "calm"}
_numbers = count()


class Lab:
    """One experiment on the server."""

    def __init__(self, server: Server, arms: list[dict[str, Any]], **more: Any) -> None:
        self.server = server
        self.key = f"e2e-{next(_numbers)}"
        weight = 1 / len(arms)
        definition = {
            "key": self.key,
            "hypothesis": "It works.",
            "unit": "user",
            "arms": [{"weight": weight, **arm} for arm in arms],
            "primary": PRIMARY,
            "minimum_effect": 0.1,
            **more,
        }
        self.post("", {"definition": definition}, 201)
        self.post(f"/{self.key}/start", {})
        database = Database(server.database)
        record = Experiments(database).find(self.key)
        database.close()
        given = {user: assign(record, {"user": user}).arm for user in map("user-{}".format, range(100))}
        self.arms = {user: arm.key for user, arm in given.items() if arm is not None}

    def post(self, path: str, document: dict[str, Any], status: int = 200) -> Any:
        reply = self.server.post(f"/admin/v1/experiments{path}", {"reason": "a test", **document})
        assert reply.status_code == status, reply.text
        return reply.json()

    def get(self, what: str) -> Any:
        reply = httpx.get(f"{self.server.base_url}/admin/v1/experiments/{self.key}{what}")
        assert reply.status_code == 200
        return reply.json()

    def user(self, arm: str) -> str:
        """A user of an arm."""
        return next(user for user, of in self.arms.items() if of == arm)

    def exported(self, what: str, n: int) -> list[dict[str, Any]]:
        """Its lines, once there are so many."""

        def lines() -> list[str]:
            reply = httpx.get(f"{self.server.base_url}/admin/v1/experiments/{self.key}/{what}")
            return reply.text.splitlines()

        wait_for(lambda: len(lines()) >= n)
        return [json.loads(line) for line in lines()]


@pytest.fixture
def lab(server: Server) -> Iterator[Callable[..., Lab]]:
    """Makes experiments, which are over afterwards."""
    made: list[Lab] = []

    def make(*arms: dict[str, Any], **more: Any) -> Lab:
        made.append(Lab(server, list(arms), **more))
        return made[-1]

    yield make
    for one in made:
        if one.get("")["state"] in ("running", "paused"):
            one.post(f"/{one.key}/stop", {})


def complete(server: Server, **fields: Any) -> httpx.Response:
    document = {"model": MODEL, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **fields}
    return server.post("/v1/completions", document)


def chat(server: Server, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Who are you?"}]
    document = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    return server.post("/v1/chat/completions", document)


CONTROL = {"key": "control"}


def test_an_arm_is_what_its_request_would_have_been(server: Server, lab: Callable[..., Lab]) -> None:
    of = lab(CONTROL, {"key": "calm", "steering": CALM})
    for arm, steering in (("control", {}), ("calm", {"steering": CALM})):
        alone, assigned = complete(server, **steering).json(), complete(server, user=of.user(arm)).json()
        assert assigned["choices"] == alone["choices"]
        assert assigned["steering"].pop("experiment") == {"key": of.key, "arm": arm}
        assert assigned["steering"].pop("source", None) == ("experiment" if arm == "calm" else None)
        assert assigned["steering"].get("plan") == alone["steering"].get("plan")
        assert assigned["steering"]["status"] == alone["steering"]["status"]


def test_a_prompt_only_arm_puts_its_prompt_in_front(server: Server, lab: Callable[..., Lab]) -> None:
    of = lab(CONTROL, {"key": "pirate", "system_prompt": "You are a pirate."})
    system = {"role": "system", "content": "You are a pirate."}
    asked = {"role": "user", "content": "Who are you?"}
    alone = chat(server, messages=[system, asked]).json()
    assigned = chat(server, user=of.user("pirate")).json()
    assert assigned["choices"] == alone["choices"]
    assert assigned["choices"] != chat(server).json()["choices"]
    fields = {"model": MODEL, "max_output_tokens": 8, "temperature": 0, "input": "Who are you?"}
    responses = [
        server.post("/v1/responses", {**fields, **more}).json()
        for more in ({"instructions": "You are a pirate."}, {"user": of.user("pirate")})
    ]
    said = [reply["output"][0]["content"][0]["text"] for reply in responses]
    assert said[0] == said[1]
    plain = complete(server, user=of.user("pirate")).json()
    assert plain["steering"] == {"status": "not_requested"}
    assert of.get("/health")["decisions"].get("not_a_chat", 0) <= 1


def test_the_gates_of_an_experiment_are_read_in_both_arms(server: Server, lab: Callable[..., Lab]) -> None:
    """The control's tokens are those of nobody's experiment, and what opened is known of it as of the treated arm."""

    def gated(above: float) -> dict[str, Any]:
        gate = {"latent": 8, "above": above}
        edit = {"bundle": "calm", "latent": 7, "operation": "add", "amount": 60.0, "scope": {"tokens": "prompt"}}
        return {"edits": [{**edit, "gate": gate}]}

    prompt = "The sea is wide and the night was long, and nobody on the old ship could tell where"
    plain = complete(server, prompt=prompt).json()["choices"]
    steered = complete(server, prompt=prompt, steering=gated(0.0)).json()
    assert steered["steering"]["gate_firings"] > 0
    for above, opens in ((0.0, True), (1e6, False)):
        of = lab(CONTROL, {"key": "calm", "steering": gated(above)})
        control, treated = (complete(server, prompt=prompt, user=of.user(arm)) for arm in ("control", "calm"))
        assert control.json()["choices"] == plain
        assert control.json()["steering"]["status"] == "not_requested"
        assert treated.json()["steering"]["status"] == "applied"
        assert treated.json()["choices"] == (steered["choices"] if opens else plain)
        exposures = of.exported("exposures", 2)
        assert {(one["arm"], one["triggered"]) for one in exposures} == {("control", opens), ("calm", opens)}
        of.post(f"/{of.key}/stop", {})


def test_every_kind_of_reply_can_be_told_of_by_its_id(server: Server, lab: Callable[..., Lab]) -> None:
    of = lab(CONTROL, {"key": "calm", "steering": CALM})
    user = of.user("calm")
    ids = [complete(server, user=user).json()["id"], chat(server, user=user).json()["id"]]
    response = {"model": MODEL, "input": "hi", "max_output_tokens": 4, "user": user}
    ids.append(server.post("/v1/responses", response).json()["id"])
    stream = Stream(server, None, user=user, max_tokens=5)
    stream.wait()
    assert stream.headers["x-trimtab-experiment"] == f"{of.key}=calm"
    ids.append(stream.events[0]["id"])
    assert [stream.events[i]["steering"]["experiment"]["arm"] for i in (0, -2)] == ["calm", "calm"]
    of.exported("exposures", 4)
    outcomes = [{"response_id": id_, "name": "harm", "value": 1} for id_ in ids]
    told = server.post("/v1/outcomes", {"outcomes": outcomes}).json()
    assert told == {"recorded": 4, "duplicate": 0, "pending": 0}
    assert len(of.exported("outcomes", 4)) == 4
    unknown = server.post("/v1/outcomes", {"outcomes": [{"response_id": "chatcmpl-1", "name": "harm", "value": 1}]})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "outcomes[0].response_id")


def test_texts_are_kept_where_the_definition_says_so_and_nowhere_else(server: Server, lab: Callable[..., Lab]) -> None:
    asked = "Whose question is this, if not mine?"
    for text in ({"text": {"share": 1, "days": 1}}, {}):
        of = lab(CONTROL, {"key": "calm", "steering": CALM}, **text)
        whole = chat(server, user=of.user("calm"), messages=[{"role": "user", "content": asked}]).json()
        stream = Stream(server, None, user=of.user("control"), max_tokens=5)
        assert stream.wait() == "[DONE]"
        of.exported("exposures", 2)
        kept = {line["arm"]: (line["prompt"], line["reply"]) for line in of.exported("texts", 2 if text else 0)}
        streamed = "".join(event["choices"][0]["text"] for event in stream.events[:-1] if event.get("choices"))
        replies = {"calm": (asked, whole["choices"][0]["message"]["content"]), "control": (LONG["prompt"], streamed)}
        assert kept == (replies if text else {})
        of.post(f"/{of.key}/stop", {})
    database = Database(server.database)
    with database.read() as connection:
        mine = connection.execute(sa.select(sa.func.count()).where(sampled_text.c.experiment == of.key))
        assert mine.scalar_one() == 0
    database.close()


def test_a_unit_that_is_no_unit_is_served_and_counted(server: Server, lab: Callable[..., Lab]) -> None:
    of = lab(CONTROL, {"key": "calm", "steering": CALM})
    for user in (None, "", "x" * 1_000_000, "a\0b"):
        assert complete(server, user=user, max_tokens=1).json()["steering"] == {"status": "not_requested"}
    header = {"x-trimtab-user": "x" * 40_000}
    ask = {"model": MODEL, "prompt": "hi", "max_tokens": 1}
    assert httpx.post(f"{server.base_url}/v1/completions", json=ask, headers=header).status_code == 431
    wait_for(lambda: of.get("/health")["decisions"] == {"missing_unit": 2, "malformed_unit": 2})
    assert metric(server, f'trimtab_experiment_decisions_total{{experiment="{of.key}",reason="missing_unit"}}') == 2


def test_under_load_no_exposure_is_lost(server: Server, lab: Callable[..., Lab]) -> None:
    of = lab(CONTROL, {"key": "calm", "steering": CALM}, grading=[{"grader": "the", "outcome": "the"}])
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda i: complete(server, user=f"user-{i}", max_tokens=2), range(96)))
    arms = [reply.json()["steering"]["experiment"]["arm"] for reply in replies]
    wait_for(lambda: of.get("/health")["exposures"]["written"] == 96)
    health = of.get("/health")
    assert health["exposures"]["dropped"] == 0
    assert (health["healthy"], health["decisions"]) == (True, {"assigned": 96})
    assert {arm["key"]: arm["requests"] for arm in health["arms"]} == {arm: arms.count(arm) for arm in set(arms)}
    assert len(of.exported("outcomes", 96)) == 96
    assert sum(of.get("/results")["units"].values()) == 96


@pytest.mark.parametrize("hung", [False, True])
def test_a_kill_reaches_streams_within_a_second(
    server: Server, lab: Callable[..., Lab], hung: bool, record_property: Callable[[str, Any], None]
) -> None:
    """It is written into the database by another process; with the engine's own processes stopped as well."""
    of = lab(CONTROL, {"key": "calm", "steering": CALM})
    calm, control = (
        Stream(server, None, user=of.user("calm")),
        Stream(server, None, user=of.user("control"), max_tokens=60),
    )
    engine = [pid for pid in descendants(server.process.pid) if "EngineCore" in comm(pid)]
    assert engine
    database = Database(server.database)
    try:
        for pid in engine if hung else ():
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)
        start = time.monotonic()
        Experiments(database).change(of.key, "kill", actor=ME, reason="it is rude")
        error = calm.wait()["error"]
        assert (error["code"], f"experiment '{of.key}' was killed" in error["message"]) == ("steering_killed", True)
        record_property("kill_seconds", calm.ended - start)
        assert calm.ended - start < WITHIN
    finally:
        database.close()
        for pid in engine if hung else ():
            os.kill(pid, signal.SIGCONT)
    assert control.wait() == "[DONE]"
    assert complete(server, user=of.user("control")).json()["steering"] == {"status": "not_requested"}
    statuses = {arm["key"]: arm["statuses"] for arm in of.get("/health")["arms"]}
    assert statuses == {"control": {"applied": 1}, "calm": {"ended": 1}}


def test_a_breached_guardrail_is_rolled_back_by_the_server(
    server: Server, lab: Callable[..., Lab], record_property: Callable[[str, Any], None]
) -> None:
    rail = {"metric": {"key": "rude", "outcome": "rude", "direction": "decrease"}, "margin": 0.1}
    of = lab(CONTROL, {"key": "calm", "steering": CALM}, guardrails=[rail])
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda i: complete(server, user=f"user-{i}", max_tokens=1).json(), range(160)))
    told = [
        {
            "response_id": reply["id"],
            "name": "rude",
            "value": (reply["steering"]["experiment"]["arm"] == "calm") + 0.01 * (i % 7),
        }
        for i, reply in enumerate(replies)
    ]
    start = time.monotonic()
    assert server.post("/v1/outcomes", {"outcomes": told}).status_code == 200
    wait_for(lambda: of.get("")["state"] == "stopped")
    record_property("rollback_seconds", time.monotonic() - start)
    last = of.get("")["history"][-1]
    assert (last["action"], last["actor"]) == ("rollback", "server")
    assert last["reason"].startswith("guardrail rude: arm calm is worse")
    # The state was read from the database; assignment hears of it with the next look of the replica.
    wait_for(lambda: complete(server, user="user-1").json()["steering"] == {"status": "not_requested"})


def test_experiments_over_grpc_are_the_same(server: Server, lab: Callable[..., Lab]) -> None:
    of = lab(CONTROL, {"key": "calm", "steering": CALM})
    with grpc.insecure_channel(server.grpc) as channel:
        inference: Any = InferenceServiceStub(channel)
        experiments: Any = ExperimentServiceStub(channel)
        ask = inference_pb2.GenerateRequest(model=MODEL, text=PROMPT)
        ask.sampling.max_tokens = 2
        reply = inference.Generate(ask, metadata=(("x-trimtab-user", of.user("calm")),))
        assert (reply.steering.experiment.key, reply.steering.experiment.arm) == (of.key, "calm")
        watch = experiments.WatchExperiment(experiment_service_pb2.WatchExperimentRequest(key=of.key))
        assert next(watch).experiment.state == experiment_service_pb2.EXPERIMENT_STATE_RUNNING
        experiments.KillExperiment(experiment_service_pb2.ChangeExperimentRequest(key=of.key, reason="over"))
        assert next(watch).experiment.state == experiment_service_pb2.EXPERIMENT_STATE_STOPPED
        watch.cancel()
