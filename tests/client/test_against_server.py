"""The client against the real server, over HTTP and over gRPC: what the fakes claim is what the server says."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.conftest import Server
from tests.e2e.test_generation import metric, wait_for
from trimtab.client import (
    Arm,
    AsyncTrimtab,
    CallError,
    InvalidSteeringError,
    Latent,
    NotAppliedError,
    Steering,
    Trimtab,
    UnknownBundleError,
    UnsupportedError,
    Vector,
    require_applied,
)

HI: Any = [{"role": "user", "content": "Write one sentence about the sea."}]
ADD = Steering(edits=[Latent("calm", 7).add(30.0).during("completion")])


def address(server: Server, transport: str) -> str:
    return server.base_url if transport == "http" else f"grpc://{server.grpc}"


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Trimtab]:
    with Trimtab(address(server, request.param), max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[Trimtab]:
    with Trimtab(server.base_url, max_retries=0) as client:
        yield client


def test_a_steered_reply_is_typed_and_proven(client: Trimtab, server: Server) -> None:
    reply = client.chat.completions.create(
        model=server.model,
        messages=HI,
        temperature=0,
        max_completion_tokens=8,
        steering=ADD,
        extra_body={"ignore_eos": True},
    )
    assert (reply.steering.status, reply.steering.bundles) == ("applied", ("calm",))
    assert (reply.steering.prompt_tokens, reply.steering.completion_tokens) == (0, 8)
    assert 0 < reply.steering.hook_points["blocks.14.resid_post"].max_relative_norm < 1
    assert reply.steering.plan == client.steering.validate(ADD).plan


def test_the_stock_sdk_gets_the_same_reply(http: Trimtab, client: Trimtab, server: Server) -> None:
    ask: dict[str, Any] = {"model": server.model, "prompt": "The sea is", "temperature": 0, "max_tokens": 8}
    mine = client.completions.create(steering=ADD, **ask)
    stock = http.openai.completions.create(**ask, **ADD.openai())
    assert stock.choices[0].text == mine.choices[0].text
    assert require_applied(stock).plan == mine.steering.plan
    with pytest.raises(NotAppliedError, match="not_requested"):
        require_applied(http.openai.completions.create(**ask))


def test_a_stream_ends_with_the_proof_of_the_whole_reply(client: Trimtab, server: Server) -> None:
    ask: dict[str, Any] = {"model": server.model, "messages": HI, "temperature": 0, "max_tokens": 8, "steering": ADD}
    whole = client.chat.completions.create(**ask)
    stream = client.chat.completions.create(**ask, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content
    assert (stream.steering.plan, stream.steering.completion_tokens) == (
        whole.steering.plan,
        whole.steering.completion_tokens,
    )


@pytest.mark.parametrize("transport", ["http", "grpc"])
async def test_the_async_client_streams_too(server: Server, transport: str) -> None:
    async with AsyncTrimtab(address(server, transport), max_retries=0) as client:
        stream = await client.completions.create(
            model=server.model, prompt="The sea is", temperature=0, max_tokens=8, steering=ADD, stream=True
        )
        assert [chunk async for chunk in stream]
        assert stream.steering.status == "applied"
        assert [bundle.name for bundle in await client.steering.bundles()] == ["calm"]
        reply = await client.chat.completions.create(model=server.model, messages=HI, max_tokens=4, steering=ADD)
        assert reply.steering.status == "applied"
        found = await client.compare({"control": None, "add": ADD}, model=server.model, prompt="The sea", max_tokens=4)
        assert [arm.steering.status for arm in found.arms.values()] == ["not_requested", "applied"]
        with pytest.raises(UnknownBundleError):
            await client.steering.validate(Steering(bundle="clam"))


def test_every_operation_is_applied(client: Trimtab, server: Server) -> None:
    edits = [
        Latent("calm", 7).clamp(0.5, unit="max_act"),
        Latent("calm", 8).scale(2.0).during("prompt"),
        Latent("calm", 9).project().at(0.5),
        Vector("calm", "mean").add(0.1, unit="resid_norm").during("completion"),
    ]
    reply = client.completions.create(
        model=server.model, prompt="The sea is wide and", max_tokens=4, steering=Steering(edits=edits)
    )
    assert reply.steering.n_tokens > 0


def test_strength_zero_asks_for_nothing_and_needs_no_proof(client: Trimtab, server: Server) -> None:
    reply = client.completions.create(model=server.model, prompt="The sea is", max_tokens=2, steering=ADD.at(0))
    assert reply.steering.n_tokens == 0


def test_the_bundles_are_told(client: Trimtab, server: Server) -> None:
    (bundle,) = client.steering.bundles()
    assert (bundle.name, bundle.content_hash, bundle.n_latents) == ("calm", server.bundle.content_hash, 3)
    assert [latent.latent for latent in client.steering.latents("calm")] == [7, 8, 9]


def test_refusals_are_typed(client: Trimtab, server: Server) -> None:
    with pytest.raises(UnknownBundleError, match="not loaded") as unknown:
        client.steering.validate(Steering(bundle="clam"))
    assert unknown.value.param == "steering.bundle"
    assert unknown.value.request_id
    with pytest.raises(UnknownBundleError):
        client.steering.latents("no-such")
    with pytest.raises(InvalidSteeringError) as invalid:
        client.completions.create(
            model=server.model,
            prompt="hi",
            steering=Steering(edits=[Latent("calm", 1).ablate(), Vector("calm", "mode").project()]),
        )
    assert [violation.field for violation in invalid.value.violations] == [
        "steering.edits[0].latent",
        "steering.edits[1].vector",
    ]


def test_what_is_not_about_steering_stays_the_sdks_own(http: Trimtab, server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="model"):
        http.completions.create(model="no-such-model", prompt="hi", steering=ADD)
    with Trimtab(address(server, "grpc")) as client:
        with pytest.raises(CallError, match="model") as caught:
            client.completions.create(model="no-such-model", prompt="hi", steering=ADD)
        assert (caught.value.code, caught.value.grpc_code, caught.value.param) == (
            "model_not_found",
            "NOT_FOUND",
            "model",
        )
        with pytest.raises(UnsupportedError, match="HTTP"):
            _ = client.openai


def test_what_latents_read_is_typed(client: Trimtab, server: Server) -> None:
    found = client.steering.inspect("calm", prompt="The sea is calm.", top_count=2, steering=ADD)
    assert "".join(token.text for token in found.tokens) == "The sea is calm."
    assert {latent.latent for token in found.tokens for latent in token.latents} <= {7, 8, 9}
    assert (found.hook_point, found.content_hash) == ("blocks.14.resid_post", server.bundle.content_hash)
    assert found.steering.status == "applied"
    by_messages = client.steering.inspect("calm", messages=HI)
    assert by_messages.tokens[0].latents == ()


def test_a_comparison_is_typed_and_proven(client: Trimtab, server: Server) -> None:
    arms = {"control": None, "add": ADD, "prompted": Arm(system_prompt="Be calm."), "control again": None}
    found = client.compare(arms, model=server.model, messages=HI, max_tokens=8, temperature=1.0, seed=3)
    assert (found.seed, list(found.arms)) == (3, list(arms))
    assert found["control"].text == found["control again"].text != found["add"].text
    assert found["add"].steering.completion_tokens > 0
    with client.compare_stream(arms, model=server.model, messages=HI, max_tokens=8, temperature=1.0, seed=3) as stream:
        with pytest.raises(NotAppliedError, match="not complete"):
            _ = stream.comparison
        said = [piece.text for piece in stream if piece.arm == "add"]
    assert "".join(said) == found["add"].text
    with pytest.raises(UnknownBundleError) as unknown:
        client.compare({"a": None, "b": Steering(bundle="clam")}, model=server.model, prompt="hi")
    assert unknown.value.param == "arms[1].steering.bundle"


def test_a_stream_that_is_closed_stops(client: Trimtab, server: Server) -> None:
    stream = client.completions.create(
        model=server.model, prompt="A long story:", max_tokens=900, extra_body={"ignore_eos": True}, stream=True
    )
    with stream:
        next(iter(stream))
    wait_for(lambda: metric(server, "vllm:num_requests_running{") == 0)
