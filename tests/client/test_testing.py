"""The fake server that ships for users' tests behaves as the real one does where they can tell."""

from typing import Any

import pytest

from trimtab.client import InvalidSteeringError, NotAppliedError, Steering
from trimtab.client.testing import FakeServer

HI: Any = [{"role": "user", "content": "Capital of France?"}]
CALM = Steering(bundle="calm", strength=0.5)


def test_a_steered_reply_is_proven_and_the_request_is_kept() -> None:
    server = FakeServer("It is Paris.")
    with server.client() as client:
        reply = client.chat.completions.create(model="m", messages=HI, steering=CALM)
        plain = client.completions.create(model="m", prompt="hi")
        plan = client.steering.validate(CALM).plan
        assert [bundle.name for bundle in client.steering.bundles()] == ["calm"]
    assert reply.choices[0].message.content == plain.choices[0].text == "It is Paris."
    assert (reply.steering.status, reply.steering.completion_tokens, reply.steering.plan) == ("applied", 3, plan)
    assert plain.steering.status == "not_requested"
    assert server.requests[0] == {"model": "m", "messages": HI, "steering": {"bundle": "calm", "strength": 0.5}}


def test_a_stream_is_the_text_word_by_word() -> None:
    with FakeServer("It is Paris.").client() as client:
        stream = client.chat.completions.create(model="m", messages=HI, steering=CALM, stream=True)
        assert [chunk.choices[0].delta.content for chunk in stream] == ["It", " is", " Paris."]
    assert stream.steering.status == "applied"


def test_a_comparison_has_all_its_arms() -> None:
    with FakeServer("It is Paris.").client() as client:
        found = client.compare({"control": None, "calm": CALM}, model="m", messages=HI, seed=7)
    assert (found.seed, list(found.arms)) == (7, ["control", "calm"])
    assert found["calm"].text == "It is Paris."
    assert [arm.steering.status for arm in found.arms.values()] == ["not_requested", "applied"]


def test_a_failure_is_raised_typed_and_once() -> None:
    server = FakeServer()
    server.fail("invalid_steering", "no such thing", param="steering.bundle")
    with server.client() as client:
        with pytest.raises(InvalidSteeringError, match="no such thing") as caught:
            client.completions.create(model="m", prompt="hi", steering=CALM)
        assert (caught.value.param, caught.value.request_id) == ("steering.bundle", "fake")
        assert client.completions.create(model="m", prompt="hi", steering=CALM).steering.status == "applied"


def test_a_server_that_forgets_its_steering_is_found_out() -> None:
    server = FakeServer()
    server.forget_steering()
    with server.client() as client:
        with pytest.raises(NotAppliedError):
            client.completions.create(model="m", prompt="hi", steering=CALM)
        with pytest.raises(NotAppliedError, match="arm 'calm'"):
            client.compare({"calm": CALM}, model="m", prompt="hi")


async def test_the_async_client_has_it_too() -> None:
    async with FakeServer("It is Paris.").async_client() as client:
        reply = await client.chat.completions.create(model="m", messages=HI, steering=CALM)
        assert reply.steering.status == "applied"
        found = await client.compare({"calm": CALM}, model="m", messages=HI)
        assert found["calm"].steering.status == "applied"
        stream = await client.completions.create(model="m", prompt="hi", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "It is Paris."
