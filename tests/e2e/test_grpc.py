"""gRPC → real server → real engine: the same replies as over HTTP, with the same proof."""

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import grpc
import openai
import pytest
from google.rpc import error_details_pb2 as details
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from tests.bundles import random_bundle
from tests.conftest import Server
from tests.e2e.test_generation import metric, wait_for
from trimtab.attribution.bundle import ModelIdentity
from trimtab.server.registry.store import digest_of
from trimtab.v1 import inference_pb2 as v1
from trimtab.v1 import registry_service_pb2 as piped
from trimtab.v1 import steering_pb2 as words
from trimtab.v1 import steering_service_pb2 as service
from trimtab.v1.inference_pb2_grpc import InferenceServiceStub
from trimtab.v1.registry_service_pb2_grpc import RegistryServiceStub
from trimtab.v1.steering_service_pb2_grpc import SteeringServiceStub

MODEL = "smollm2-135m-instruct"
CALM = words.Steering(bundle="calm")
GREEDY = v1.Sampling(temperature=0, max_tokens=12, ignore_eos=True)
TEXT = v1.GenerateRequest(model=MODEL, text="The sea is", sampling=GREEDY, steering=CALM)
CHAT = v1.ChatCompleteRequest(
    model=MODEL,
    messages=[v1.ChatMessage(role="user", content="Write one sentence about the sea.")],
    sampling=GREEDY,
    steering=CALM,
)


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


@pytest.fixture
def inference(channel: grpc.Channel) -> Any:
    return InferenceServiceStub(channel)


@pytest.fixture
def steering(channel: grpc.Channel) -> Any:
    return SteeringServiceStub(channel)


def test_a_text_is_the_one_that_http_gives(inference: Any, client: openai.OpenAI) -> None:
    reply = inference.Generate(TEXT)
    body = {"ignore_eos": True, "steering": {"bundle": "calm"}}
    same: Any = client.completions.create(
        model=MODEL, prompt="The sea is", temperature=0, max_tokens=12, extra_body=body
    )
    assert reply.completions[0].text == same.choices[0].text
    assert (reply.steering.status, reply.steering.plan) == (words.STATUS_APPLIED, same.steering["plan"])
    assert (reply.steering.completion_token_count, reply.usage.completion_token_count) == (12, 12)
    assert [point.hook_point for point in reply.steering.hook_points] == ["blocks.14.resid_post"]


def test_tokens_are_a_prompt_too(inference: Any, server: Server) -> None:
    ids = server.post("/v1/tokenize", {"model": MODEL, "prompt": "The sea is"}).json()["tokens"]
    by_tokens = v1.GenerateRequest(model=MODEL, token_ids=v1.TokenIds(ids=ids), sampling=GREEDY, steering=CALM)
    assert inference.Generate(by_tokens).completions[0].text == inference.Generate(TEXT).completions[0].text


def test_a_stream_is_the_same_with_the_plan_first_and_the_proof_last(inference: Any) -> None:
    whole = inference.ChatComplete(CHAT)
    pieces = list(inference.StreamChatComplete(CHAT))
    text = "".join(choice.message.content for piece in pieces for choice in piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[0].steering.status == words.STATUS_REQUESTED
    assert pieces[-1].steering.status == words.STATUS_APPLIED
    assert pieces[-1].steering.completion_token_count == pieces[-1].usage.completion_token_count == 12
    assert pieces[-1].steering.plan == whole.steering.plan
    assert "length" in [choice.finish_reason for piece in pieces for choice in piece.choices]


def test_what_asks_for_no_edit_says_so(inference: Any) -> None:
    plain = v1.GenerateRequest(model=MODEL, text="The sea is", sampling=GREEDY)
    assert inference.Generate(plain).steering.status == words.STATUS_NOT_REQUESTED


def test_samples_and_log_probabilities(inference: Any) -> None:
    request = v1.GenerateRequest()
    request.CopyFrom(TEXT)
    request.sampling.MergeFrom(v1.Sampling(n=2, logprobs=2, temperature=1, seed=5))
    reply = inference.Generate(request)
    assert [completion.index for completion in reply.completions] == [0, 1]
    assert all(len(completion.logprobs) == 12 for completion in reply.completions)
    assert all(len(token.top) >= 2 and token.logprob <= 0 for token in reply.completions[0].logprobs)
    assert reply.steering.completion_token_count == 24


def test_a_bundle_that_is_uploaded_and_promoted_steers_until_it_is_revoked(
    channel: grpc.Channel, inference: Any, embedded_identity: ModelIdentity
) -> None:
    registry: Any = RegistryServiceStub(channel)
    data = random_bundle(embedded_identity, name="piped", layer=9).to_bytes()
    pieces = [piped.UploadBundleRequest(chunk=data[start : start + 4096]) for start in range(0, len(data), 4096)]
    end = piped.UploadBundleRequest(end=piped.UploadEnd(digest=digest_of(data)))
    version = registry.UploadBundle(iter([*pieces, end])).version
    assert (version.state, version.byte_count) == (piped.VERSION_STATE_DRAFT, len(data))
    registry.Promote(piped.PromoteRequest(reference=version.reference, make_default=True))
    ask = v1.GenerateRequest(model=MODEL, text="The sea is", sampling=GREEDY, steering=words.Steering(bundle="piped"))

    def loaded() -> bool:
        try:
            return list(inference.Generate(ask).steering.bundles) == [version.reference]
        except grpc.RpcError:
            return False

    wait_for(loaded)
    registry.Revoke(piped.RevokeRequest(reference=version.reference, reason="the test is over"))
    with pytest.raises(grpc.RpcError) as caught:
        inference.Generate(
            v1.GenerateRequest(model=MODEL, text="hi", steering=words.Steering(bundle=version.reference))
        )
    assert cast(Any, caught.value).code() == grpc.StatusCode.FAILED_PRECONDITION


def test_arms_run_side_by_side_with_one_seed(inference: Any) -> None:
    chat = v1.ChatCompleteRequest(
        model=MODEL, messages=CHAT.messages, sampling=v1.Sampling(temperature=1, seed=5, max_tokens=48, ignore_eos=True)
    )
    arms = [
        v1.Arm(name="control"),
        v1.Arm(name="calm", steering=CALM),
        v1.Arm(name="control again"),
        v1.Arm(name="prompted", system_prompt="Be calm."),
    ]
    pieces = list(inference.Compare(v1.CompareRequest(chat=chat, arms=arms)))
    said = [
        "".join(p.chat.choices[0].message.content for p in pieces if p.arm == i and p.chat.choices) for i in range(4)
    ]
    assert said[0] == said[2] != said[1]
    assert len({piece.seed for piece in pieces}) == 1
    last = {piece.name: piece.chat.steering for piece in pieces}
    assert last["calm"].status == words.STATUS_APPLIED
    assert last["control"].status == last["prompted"].status == words.STATUS_NOT_REQUESTED
    first = [piece.arm for piece in pieces]
    assert first.index(1) < len(first) - 1 - first[::-1].index(0), "the arms did not run at the same time"


def test_an_arm_that_is_refused_is_named_and_none_runs(inference: Any) -> None:
    bad = words.Steering(free_form=words.Edits(edits=[words.Edit(bundle="calm", latent=5)]))
    arms = [v1.Arm(name="a"), v1.Arm(name="a", steering=bad)]
    text = v1.GenerateRequest(model=MODEL, text="hi")
    assert refused(lambda: list(inference.Compare(v1.CompareRequest(generate=text, arms=arms))))[1] == ["arms[1].name"]
    arms[1].name = "b"
    code, fields, reason = refused(lambda: list(inference.Compare(v1.CompareRequest(generate=text, arms=arms))))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_STEERING")
    assert fields == ["arms[1].steering.free_form.edits[0].operation"]


def refused(call: Any) -> tuple[grpc.StatusCode, list[str], str]:
    """Code, fields and reason of a refusal."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(cast(Any, caught.value))
    info, bad = details.ErrorInfo(), details.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    assert status.message
    assert info.domain == "trimtab"
    return caught.value.code(), [violation.field for violation in bad.field_violations], info.reason


@pytest.mark.parametrize(
    ("request_", "code", "fields", "reason"),
    [
        (v1.GenerateRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT, ["prompt"], "INVALID_REQUEST"),
        (v1.GenerateRequest(model="gpt-4o", text="hi"), grpc.StatusCode.NOT_FOUND, ["model"], "MODEL_NOT_FOUND"),
        (
            v1.GenerateRequest(model=MODEL, text="hi", steering=words.Steering(bundle="clam")),
            grpc.StatusCode.NOT_FOUND,
            ["steering.bundle"],
            "UNKNOWN_BUNDLE",
        ),
        (
            v1.GenerateRequest(model=MODEL, text="hi", sampling=v1.Sampling(temperature=-1)),
            grpc.StatusCode.INVALID_ARGUMENT,
            ["sampling.temperature"],
            "INVALID_REQUEST",
        ),
        (
            v1.GenerateRequest(
                model=MODEL,
                text="hi",
                steering=words.Steering(
                    free_form=words.Edits(
                        edits=[words.Edit(bundle="calm", latent=70000, operation=words.OPERATION_ABLATE)]
                    )
                ),
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
            ["steering.free_form.edits[0].latent"],
            "INVALID_STEERING",
        ),
        (
            v1.GenerateRequest(model=MODEL, text="hi", steering=words.Steering()),
            grpc.StatusCode.INVALID_ARGUMENT,
            ["steering"],
            "INVALID_STEERING",
        ),
    ],
)
def test_refusals_are_rich_and_name_the_field(
    inference: Any, request_: Any, code: grpc.StatusCode, fields: list[str], reason: str
) -> None:
    assert refused(lambda: inference.Generate(request_)) == (code, fields, reason)
    assert refused(lambda: list(inference.StreamGenerate(request_))) == (code, fields, reason)


def test_a_message_too_large_is_refused(inference: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        inference.Generate(v1.GenerateRequest(model=MODEL, text="a" * (9 << 20)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


LONG = v1.GenerateRequest(
    model=MODEL, text="A long story:", sampling=v1.Sampling(max_tokens=900, ignore_eos=True), steering=CALM
)


@pytest.mark.parametrize("call", ["Generate", "StreamGenerate"])
def test_a_deadline_stops_the_engine(inference: Any, server: Server, call: str) -> None:
    before = metric(server, 'trimtab_requests_total{status="abandoned"}')
    with pytest.raises(grpc.RpcError) as caught:
        list(getattr(inference, call)(LONG, timeout=1.0))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: metric(server, 'trimtab_requests_total{status="abandoned"}') == before + 1)
    wait_for(lambda: metric(server, "vllm:num_requests_running{") == 0)


async def test_a_cancel_stops_the_engine_within_a_step(server: Server) -> None:
    """Tokens that were generated after the cancel arrived: those of the step under way, and of one that was scheduled ahead."""
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        before = metric(server, "vllm:generation_tokens_total{")
        stream = InferenceServiceStub(channel).StreamGenerate(LONG)
        n_seen = 0
        async for piece in stream:
            n_seen += sum(bool(completion.text) for completion in piece.completions)
            if n_seen == 10:
                stream.cancel()
                break
        await asyncio.sleep(2.0)
    assert metric(server, "vllm:num_requests_running{") == 0
    assert metric(server, "vllm:generation_tokens_total{") - before <= 10 + 4


def test_validation_and_bundles(steering: Any, server: Server, inference: Any) -> None:
    found = steering.Validate(service.ValidateRequest(steering=CALM))
    assert found.plan == inference.Generate(TEXT).steering.plan
    assert (list(found.hook_points), found.row_count) == (["blocks.14.resid_post"], 2)
    (listed,) = steering.ListBundles(service.ListBundlesRequest()).bundles
    assert (listed.name, listed.content_hash, listed.pinned) == ("calm", server.bundle.content_hash, True)
    assert [edit.operation for edit in listed.edits] == [words.OPERATION_ADD, words.OPERATION_ABLATE]
    bundle = steering.GetBundle(service.GetBundleRequest(name="calm"))
    assert [latent.latent for latent in bundle.latents] == [7, 8, 9]
    assert bundle.latents[0].attribution == 0.1
    assert not bundle.latents[0].HasField("effect")
    assert refused(lambda: steering.GetBundle(service.GetBundleRequest(name="clam")))[2] == "UNKNOWN_BUNDLE"
    assert refused(lambda: steering.Validate(service.ValidateRequest()))[2] == "INVALID_STEERING"


def test_health_is_told(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", "trimtab.v1.InferenceService", "trimtab.v1.SteeringService"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING


def test_the_contract_is_told_by_reflection(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"trimtab.v1.InferenceService", "trimtab.v1.SteeringService"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("trimtab.v1.InferenceService")
    assert [method.name for method in file.service[0].method] == [
        "Generate",
        "StreamGenerate",
        "ChatComplete",
        "StreamChatComplete",
        "Compare",
    ]


def test_a_call_has_an_id(inference: Any) -> None:
    _, call = inference.Generate.with_call(
        v1.GenerateRequest(model=MODEL, text="hi", sampling=v1.Sampling(max_tokens=1))
    )
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 32
