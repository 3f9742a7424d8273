"""The client sends what was asked for, types what comes back, and never passes off an unsteered reply as a steered one."""

import inspect
from typing import Any

import httpx2
import openai
import pytest

from tests.client.fakes import PROOF, Answer, answers, chat_chunks, chat_reply, streams, transport
from trimtab.client import (
    AsyncTrimtab,
    InvalidSteeringError,
    Latent,
    NotAppliedError,
    Steering,
    Trimtab,
    TrimtabError,
    UnknownBundleError,
    Violation,
    aio,
    http,
)

CALM = Steering(edits=[Latent("calm", 5120).clamp(0.0).during("completion")])
HI: Any = [{"role": "user", "content": "Hi"}]


def client(answer: Answer, seen: list[Any] | None = None) -> Trimtab:
    handler = httpx2.Client(transport=transport(answer, seen))
    return Trimtab("http://fake", http_client=handler, max_retries=0)


def async_client(answer: Answer) -> AsyncTrimtab:
    handler = httpx2.AsyncClient(transport=transport(answer))
    return AsyncTrimtab("http://fake", http_client=handler, max_retries=0)


def test_steering_goes_beside_the_sdks_own_parameters() -> None:
    seen: list[Any] = []
    with client(answers(chat_reply(PROOF)), seen) as trimtab:
        reply = trimtab.chat.completions.create(
            model="m", messages=HI, temperature=0, steering=CALM, extra_body={"top_k": 5}
        )
    assert seen == [{"model": "m", "messages": HI, "temperature": 0, "top_k": 5, "steering": CALM.to_dict()}]
    assert reply.choices[0].message.content == "Paris."
    assert reply.steering.completion_tokens == 7


def test_a_steered_reply_without_proof_is_an_error() -> None:
    """Symptom: a server without Trimtab ignores `steering` and answers 200, fluent and unsteered."""
    with client(answers(chat_reply(None))) as trimtab, pytest.raises(NotAppliedError, match="carries no `steering`"):
        trimtab.chat.completions.create(model="m", messages=HI, steering=CALM)


def test_failing_open_is_returned_and_says_so() -> None:
    with client(answers(chat_reply({"status": "failed_open", "plan": PROOF["plan"]}))) as trimtab:
        is_open = Steering(bundle="calm", on_failure="open")
        assert (
            trimtab.chat.completions.create(model="m", messages=HI, steering=is_open).steering.status == "failed_open"
        )
        with pytest.raises(NotAppliedError, match="failed_open"):
            trimtab.chat.completions.create(model="m", messages=HI, steering=Steering(bundle="calm"))


def test_a_stream_ends_with_its_proof() -> None:
    with client(streams(chat_chunks(opening={"status": "requested"}, closing=PROOF))) as trimtab:
        stream = trimtab.chat.completions.create(model="m", messages=HI, steering=CALM, stream=True)
        with pytest.raises(NotAppliedError, match="not complete"):
            _ = stream.steering
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Paris."
    assert stream.steering.plan == PROOF["plan"]


def test_a_stream_without_proof_raises_at_its_end() -> None:
    with client(streams(chat_chunks(opening={"status": "requested"}, closing=None))) as trimtab:
        stream = trimtab.chat.completions.create(model="m", messages=HI, steering=CALM, stream=True)
        with pytest.raises(NotAppliedError, match="'requested'"):
            list(stream)


def test_an_error_in_the_middle_of_a_stream_is_typed() -> None:
    error = {"error": {"message": "2 of 3 tokens edited", "code": "steering_not_applied", "param": None}}
    events = [*chat_chunks(opening={"status": "requested"}, closing=None)[:2], error]
    with client(streams(events)) as trimtab:
        stream = trimtab.chat.completions.create(model="m", messages=HI, steering=CALM, stream=True)
        with pytest.raises(NotAppliedError, match="2 of 3 tokens edited"):
            list(stream)


def test_every_violation_of_a_refusal_is_listed() -> None:
    violations = [
        {"field": "steering.edits[0].latent", "message": "is not held"},
        {"field": "steering.x", "message": "?"},
    ]
    error = {"message": "no", "code": "invalid_steering", "param": "steering.edits[0].latent", "violations": violations}
    with client(answers({"error": error}, status=400)) as trimtab, pytest.raises(InvalidSteeringError) as caught:
        trimtab.chat.completions.create(model="m", messages=HI, steering=CALM)
    assert caught.value.violations == (
        Violation("steering.edits[0].latent", "is not held"),
        Violation("steering.x", "?"),
    )
    assert (caught.value.request_id, caught.value.status, caught.value.param) == (
        "req-7",
        400,
        "steering.edits[0].latent",
    )
    assert isinstance(caught.value.__cause__, openai.BadRequestError)


def test_an_unknown_bundle_is_told_from_an_unknown_model() -> None:
    for code, kind in (("unknown_bundle", UnknownBundleError), ("model_not_found", openai.NotFoundError)):
        body = {"error": {"message": "no", "code": code, "param": None}}
        with client(answers(body, status=404)) as trimtab, pytest.raises(kind):
            trimtab.chat.completions.create(model="m", messages=HI, steering=CALM)


def test_steering_given_twice_is_refused() -> None:
    with client(answers({})) as trimtab, pytest.raises(InvalidSteeringError, match="twice"):
        trimtab.chat.completions.create(model="m", messages=HI, steering=CALM, extra_body=CALM.openai()["extra_body"])


@pytest.mark.parametrize("base_url", ["http://fake", "http://fake/", "http://fake/v1"])
def test_the_root_of_a_server_is_enough(base_url: str) -> None:
    with Trimtab(base_url) as trimtab:
        assert str(trimtab.openai.base_url) == "http://fake/v1/"


def test_no_url_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give the server's root"):
        Trimtab("127.0.0.1:8000")


def test_an_openai_key_is_never_sent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Trimtab("http://fake") as trimtab:
        assert trimtab.openai.api_key == "none"


def test_bundles_are_typed() -> None:
    edit = {"latent": 5120, "operation": "clamp", "amount": 0.0, "unit": "raw", "scope": "completion"}
    bundle = {
        "name": "calm",
        "content_hash": "sha256:00",
        "behaviour": "Stays calm.",
        "model": "m",
        "hook_point": "blocks.14.resid_post",
        "n_latents": 1,
        "n_vectors": 0,
        "edits": [edit],
        "pinned": True,
    }
    with client(answers({"object": "list", "data": [bundle]})) as trimtab:
        (summary,) = trimtab.steering.bundles()
    assert (summary.name, summary.n_latents, dict(summary.edits[0])) == ("calm", 1, edit)
    assert summary.pinned


def test_a_foreign_servers_listing_is_an_error() -> None:
    with client(answers({"object": "list"})) as trimtab, pytest.raises(TrimtabError, match="cannot be read"):
        trimtab.steering.bundles()


async def test_the_async_client_requires_proof_too() -> None:
    async with async_client(answers(chat_reply(PROOF))) as trimtab:
        reply = await trimtab.chat.completions.create(model="m", messages=HI, steering=CALM)
        assert reply.steering.completion_tokens == 7
    async with async_client(answers(chat_reply(None))) as trimtab:
        with pytest.raises(NotAppliedError):
            await trimtab.chat.completions.create(model="m", messages=HI, steering=CALM)


async def test_an_async_stream_ends_with_its_proof() -> None:
    async with async_client(streams(chat_chunks(opening={"status": "requested"}, closing=PROOF))) as trimtab:
        stream = await trimtab.chat.completions.create(model="m", messages=HI, steering=CALM, stream=True)
        text = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(text) == "Paris."
    assert stream.steering.plan == PROOF["plan"]


@pytest.mark.parametrize("name", ["", "Stream", "Chat", "ChatCompletions", "Completions", "SteeringRoutes"])
def test_sync_and_async_have_the_same_methods(name: str) -> None:
    prefix = {"": ("Trimtab", "AsyncTrimtab"), "Stream": ("TrimtabStream", "AsyncTrimtabStream")}
    mine, theirs = prefix.get(name, (name, f"Async{name}"))

    def methods(kind: type) -> dict[str, list[str]]:
        public = {
            n: f for n, f in inspect.getmembers(kind, inspect.isfunction) if not n.startswith("_") or n == "__init__"
        }
        return {n: list(inspect.signature(f).parameters) for n, f in public.items()}

    assert methods(getattr(http, mine)) == methods(getattr(aio, theirs))
