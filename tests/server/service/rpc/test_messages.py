"""A message is the request that it spells, and a reply says all that the JSON says."""

from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from trimtab.server.errors import InvalidRequest
from trimtab.server.service.applied import NOT_REQUESTED
from trimtab.server.service.rpc import replies, requests
from trimtab.server.steering import Steering, parse_steering
from trimtab.v1 import inference_pb2 as v1
from trimtab.v1 import steering_pb2 as words

EDITS = [
    words.Edit(bundle="calm", latent=7, operation=words.OPERATION_ADD, amount=30, unit=words.UNIT_MAX_ACT),
    words.Edit(bundle="calm", latent=0, operation=words.OPERATION_CLAMP, target=0.0, strength=0.0),
    words.Edit(
        bundle="calm",
        vector="mean",
        operation=words.OPERATION_PROJECT,
        scope=words.Scope(
            tokens=words.SCOPE_TOKENS_PROMPT,
            first_token=True,
            exclude_special=True,
            window=words.PositionWindow(origin=words.ORIGIN_PROMPT_END, start=-5, stop=0),
        ),
        gate=words.Gate(latent=0, above=0.0, mode=words.GATE_MODE_ONWARD),
    ),
]
SAID: list[dict[str, Any]] = [
    {"bundle": "calm", "latent": 7, "operation": "add", "amount": 30.0, "unit": "max_act"},
    {"bundle": "calm", "latent": 0, "operation": "clamp", "target": 0.0, "strength": 0.0},
    {
        "bundle": "calm",
        "vector": "mean",
        "operation": "project",
        "scope": {
            "tokens": "prompt",
            "first_token": True,
            "exclude_special": True,
            "window": {"origin": "prompt_end", "start": -5, "stop": 0},
        },
        "gate": {"latent": 0, "above": 0.0, "mode": "onward"},
    },
]


def struct(**fields: Any) -> Struct:
    return ParseDict(fields, Struct())


def test_steering_is_the_json_that_it_spells() -> None:
    message = words.Steering(free_form=words.Edits(edits=EDITS), strength=0.5, on_failure=words.ON_FAILURE_OPEN)
    field = requests.steering_field(message)
    assert field == {"edits": SAID, "strength": 0.5, "on_failure": "open"}
    assert isinstance(parse_steering(field), Steering)
    assert requests.steering_field(words.Steering(bundle="calm")) == {"bundle": "calm"}
    assert requests.steering_field(words.Steering(free_form=words.Edits())) == {"edits": []}


def test_a_word_that_the_server_does_not_know_is_left_for_admission_to_refuse() -> None:
    message = words.Steering(bundle="calm")
    message.MergeFromString(b"\x20\x63")  # on_failure = 99, of a later release
    assert requests.steering_field(message)["on_failure"] == "99"


def test_a_text_request_is_the_body_of_a_completion() -> None:
    request = v1.GenerateRequest(
        model="m",
        text="hi",
        sampling=v1.Sampling(max_tokens=5, temperature=0, stop=["."], seed=0, n=2, logprobs=0, ignore_eos=True),
        options=struct(min_tokens=3, logit_bias={"5": -1.5}),
    )
    expected = {
        "model": "m",
        "prompt": "hi",
        "max_tokens": 5,
        "temperature": 0.0,
        "stop": ["."],
        "seed": 0,
        "n": 2,
        "logprobs": 0,
        "ignore_eos": True,
        "min_tokens": 3,
        "logit_bias": {"5": -1.5},
    }
    assert requests.generate(request, stream=False) == expected
    assert isinstance(requests.generate(request, stream=False)["min_tokens"], int)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert requests.generate(request, stream=True) == expected | streamed


def test_a_chat_request_is_the_body_of_a_chat_completion() -> None:
    call = v1.ToolCall(id="1", name="weather", arguments="{}")
    turns = [
        v1.ChatMessage(role="user", content="hi"),
        v1.ChatMessage(role="assistant", tool_calls=[call]),
        v1.ChatMessage(role="tool", content="sunny", tool_call_id="1"),
    ]
    body = requests.chat_complete(
        v1.ChatCompleteRequest(model="m", messages=turns, sampling=v1.Sampling(logprobs=2)), stream=False
    )
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert body == {
        "model": "m",
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [called]},
            {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        ],
        "logprobs": True,
        "top_logprobs": 2,
    }


@pytest.mark.parametrize("name", ["prompt", "stream", "steering", "temperature", "model", "stream_options"])
def test_an_option_that_has_its_place_elsewhere_is_refused(name: str) -> None:
    request = v1.GenerateRequest(model="m", text="hi", options=struct(**{name: 1}))
    with pytest.raises(InvalidRequest) as caught:
        requests.generate(request, stream=False)
    assert [violation.field for violation in caught.value.violations] == [f"options.{name}"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_has_not_is_refused(number: float) -> None:
    """It ended a call with INTERNAL."""
    request = v1.GenerateRequest(model="m", text="hi")
    request.options["logit_bias"] = {"5": number}
    with pytest.raises(InvalidRequest) as caught:
        requests.generate(request, stream=False)
    assert caught.value.field == "options"


def test_a_request_without_a_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        requests.generate(v1.GenerateRequest(model="m"), stream=False)
    with pytest.raises(InvalidRequest):
        requests.compare(v1.CompareRequest())


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("steering.edits[0].latent", "steering.free_form.edits[0].latent"),
        ("steering.bundle", "steering.bundle"),
        ("temperature", "sampling.temperature"),
        ("prompt", "text"),
        ("messages[0].role", "messages[0].role"),
        ("min_tokens", "options.min_tokens"),
        ("model", "model"),
    ],
)
def test_a_field_of_the_json_has_a_path_in_the_message(field: str, path: str) -> None:
    assert requests.path(field) == path


def test_a_field_of_an_arm_has_a_path_in_the_comparison() -> None:
    assert (
        requests.compare_path("arms[1].steering.edits[0].x", "chat", "text") == "arms[1].steering.free_form.edits[0].x"
    )
    assert requests.compare_path("temperature", "chat", "text") == "chat.sampling.temperature"


def test_the_proof_keeps_every_count() -> None:
    point = {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "cached_prompt_tokens": 3,
        "gate_firings": 4,
        "special_tokens": 5,
        "max_relative_norm": 0.5,
        "mean_relative_norm": 0.25,
    }
    document = {"status": "applied", "plan": "sha256:0", "bundles": ["calm"], **point, "hook_points": {"a": point}}
    message = replies.applied(document)
    assert message.status == words.STATUS_APPLIED
    assert (message.plan, list(message.bundles)) == ("sha256:0", ["calm"])
    for counted in (message, message.hook_points[0]):
        assert (counted.prompt_token_count, counted.completion_token_count) == (1, 2)
        assert (counted.cached_prompt_token_count, counted.gate_firing_count, counted.special_token_count) == (3, 4, 5)
        assert (counted.max_relative_norm, counted.mean_relative_norm) == (0.5, 0.25)
    assert replies.applied(NOT_REQUESTED).status == words.STATUS_NOT_REQUESTED
