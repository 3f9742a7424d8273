"""One prompt with one seed under several steerings, over HTTP."""

import json
from typing import Any

import httpx
import pytest

from tests.conftest import Server
from tests.e2e.test_generation import metric, wait_for

MODEL = "smollm2-135m-instruct"
ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Write one sentence about the sea."}],
    "max_tokens": 12,
    "ignore_eos": True,
}
ARMS: list[dict[str, Any]] = [
    {"name": "control"},
    {"name": "calm", "steering": {"bundle": "calm"}},
    {"name": "prompted", "system_prompt": "Be calm."},
]


def test_arms_differ_by_their_steering_alone(server: Server) -> None:
    found = server.post("/v1/steering/compare", {**ASK, "arms": [*ARMS, {"name": "control again"}]}).json()
    said = [arm["reply"]["choices"][0]["message"]["content"] for arm in found["arms"]]
    assert said[0] == said[3] != said[1]
    assert [arm["reply"]["steering"]["status"] for arm in found["arms"]] == [
        "not_requested",
        "applied",
        "not_requested",
        "not_requested",
    ]
    alone = server.post("/v1/chat/completions", {**ASK, "seed": found["seed"], "steering": {"bundle": "calm"}}).json()
    assert alone["choices"][0]["message"]["content"] == said[1]


def test_a_stream_of_arms_is_the_same_text_with_each_arms_proof(server: Server) -> None:
    whole = server.post("/v1/steering/compare", {**ASK, "seed": 5, "arms": ARMS}).json()
    ask = {**ASK, "seed": 5, "arms": ARMS, "stream": True}
    with httpx.stream("POST", server.base_url + "/v1/steering/compare", json=ask, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    pieces = [json.loads(line) for line in lines]
    assert {piece["seed"] for piece in pieces} == {5}
    for i, arm in enumerate(whole["arms"]):
        chunks = [piece["chunk"] for piece in pieces if piece["arm"] == i]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
        assert text == arm["reply"]["choices"][0]["message"]["content"]
        assert chunks[-1]["steering"] == {**arm["reply"]["steering"], **_norms(chunks[-1]["steering"])}


def _norms(steering: dict[str, Any]) -> dict[str, Any]:
    """Counts of the cache and norms differ between runs."""
    free = ("max_relative_norm", "mean_relative_norm", "prompt_tokens", "cached_prompt_tokens", "hook_points")
    return {name: steering[name] for name in free if name in steering}


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"arms": []}, {"arms"}),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, {"arms[1].name"}),
        ({"arms": [{"name": "a", "strength": 1}]}, {"arms[0].strength"}),
        ({"arms": [{"steering": {"bundle": "calm"}}]}, {"arms[0].name"}),
        ({"steering": {"bundle": "calm"}}, {"steering"}),
        ({"model": f"{MODEL}@calm"}, {"model"}),
        ({"arms": [{"name": "a", "steering": {"bundle": "calm", "strenght": 1}}]}, {"arms[0].steering.strenght"}),
        ({"arms": [{"name": str(i)} for i in range(17)]}, {"arms"}),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_arm_at_fault(
    server: Server, change: dict[str, Any], fields: set[str]
) -> None:
    reply = server.post("/v1/steering/compare", {**ASK, "arms": ARMS, **change})
    assert reply.status_code == 400, reply.text
    assert {violation["field"] for violation in reply.json()["error"]["violations"]} == fields


def test_vllms_own_checks_keep_their_field(server: Server) -> None:
    reply = server.post("/v1/steering/compare", {**ASK, "arms": ARMS, "temperature": -1})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "temperature")


def test_an_unknown_bundle_names_its_arm(server: Server) -> None:
    arms = [{"name": "a"}, {"name": "b", "steering": {"bundle": "clam"}}]
    reply = server.post("/v1/steering/compare", {**ASK, "arms": arms})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "arms[1].steering.bundle")


def test_a_text_takes_no_system_prompt(server: Server) -> None:
    ask = {"model": MODEL, "prompt": "The sea", "max_tokens": 3, "arms": ARMS}
    reply = server.post("/v1/steering/compare", ask)
    assert reply.json()["error"]["param"] == "arms[2].system_prompt"
    found = server.post("/v1/steering/compare", {**ask, "arms": ARMS[:2]}).json()
    assert [len(arm["reply"]["choices"][0]["text"]) > 0 for arm in found["arms"]] == [True, True]


def test_a_reader_who_goes_away_stops_every_arm(server: Server) -> None:
    before = metric(server, 'trimtab_requests_total{status="abandoned"}')
    ask = {**ASK, "max_tokens": 900, "arms": ARMS, "stream": True}
    with httpx.stream("POST", server.base_url + "/v1/steering/compare", json=ask, timeout=60) as response:
        next(response.iter_lines())
    wait_for(lambda: metric(server, 'trimtab_requests_total{status="abandoned"}') == before + 3)
    wait_for(lambda: metric(server, "vllm:num_requests_running{") == 0)
