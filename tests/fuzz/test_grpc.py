"""Messages of any content, and bytes that are none, to every method: a reply or a typed error, and an engine that goes on."""

from collections.abc import Iterator
from typing import Any, cast

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Server
from tests.fuzz.test_openapi import steered
from trimtab.v1 import experiment_service_pb2, inference_pb2, registry_service_pb2, steering_service_pb2

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    steering_service_pb2.DESCRIPTOR.services_by_name["SteeringService"],
    registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"],
    experiment_service_pb2.DESCRIPTOR.services_by_name["ExperimentService"],
)
METHODS = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
TYPED = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
WORDS = (
    "calm",
    "smollm2-135m-instruct",
    "smollm2-135m-instruct@calm:0.5",
    "mean",
    "user",
    "calm:v1",
    "",
    "\0",
    "é" * 40,
)
NUMBERS = st.sampled_from([0.0, 1.0, 0.5, -1.0, 1e30, float("inf"), float("nan")]) | st.floats(width=32)
STRUCTURES: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["min_tokens", "logit_bias", "tools", "response_format", "key", "arms", "primary", "alpha"]),
    st.recursive(
        st.none() | st.booleans() | NUMBERS | st.sampled_from(WORDS),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)
SETTINGS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MAX_TOKENS = 4


def scalar(field: Any) -> st.SearchStrategy[Any]:
    """Values of a field that is no message: likely ones, and the edges."""
    match field.cpp_type:
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            return st.binary(max_size=20)
        case field.CPPTYPE_STRING:
            return st.sampled_from(WORDS) | st.text(max_size=20)
        case field.CPPTYPE_BOOL:
            return st.booleans()
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            return NUMBERS
        case field.CPPTYPE_ENUM:
            return st.integers(0, 6)
        case field.CPPTYPE_UINT32 | field.CPPTYPE_UINT64:
            return st.sampled_from([0, 1, 7, 8, 2**32 - 1]) | st.integers(0, 2**32 - 1)
        case field.CPPTYPE_INT64:
            return st.sampled_from([0, 1, -1, 2**62, -(2**62)]) | st.integers(-(2**40), 2**40)
        case _:
            return st.sampled_from([0, 1, 7, -1, 2**31 - 1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1)


def fill(draw: Any, message: Message, depth: int = 0) -> Message:
    """Some of the message's fields, whatever goes together or not."""
    for field in message.DESCRIPTOR.fields:
        if depth > 5 or draw(st.integers(0, 2 + depth // 2)) > 1:
            continue
        if field.message_type is not None and field.message_type.full_name == "google.protobuf.Struct":
            getattr(message, field.name).update(draw(STRUCTURES))
        elif field.message_type is not None:
            for _ in range(draw(st.integers(0, 2)) if field.is_repeated else 1):
                inner = getattr(message, field.name)
                fill(draw, inner.add() if field.is_repeated else inner, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(scalar(field), max_size=3)))
        else:
            setattr(message, field.name, draw(scalar(field)))
    return message


def shortened(message: Any) -> Any:
    """The same, costing the engine little."""
    for part in (message, getattr(message, "generate", None), getattr(message, "chat", None)):
        sampling = getattr(part, "sampling", None)
        if sampling is not None:
            sampling.max_tokens = (
                min(sampling.max_tokens, MAX_TOKENS) if sampling.HasField("max_tokens") else MAX_TOKENS
            )
            if sampling.HasField("n"):
                sampling.n = min(sampling.n, 2)
    return message


@st.composite
def messages(draw: Any, kind: type[Message]) -> bytes:
    return cast(bytes, shortened(fill(draw, kind())).SerializeToString())


def kind_of(method: Any) -> type[Message]:
    return cast(type[Message], method.input_type._concrete_class)


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    before = steered(server)
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel
    assert steered(server) == before


def outcome(channel: grpc.Channel, path: str, data: bytes) -> str:
    """The code that a call ends with; an error must say all that a client needs."""
    method = METHODS[path]
    ways = {False: channel.unary_stream, True: channel.stream_stream}
    call: Any = ways[method.client_streaming](path, request_serializer=None, response_deserializer=None)
    try:
        for _ in call(iter([data]) if method.client_streaming else data, timeout=120):
            pass
    except grpc.RpcError as e:
        error = cast(Any, e)
        status = rpc_status.from_call(error)
        assert status is not None, (path, data, error.code(), error.details())
        info = details.ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details)
        assert (info.domain, info.reason != "") == ("trimtab", True)
        return str(error.code().name)
    return "OK"


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_any_message_gets_a_reply_or_a_typed_error(channel: grpc.Channel, path: str, examples: int) -> None:
    @settings(SETTINGS, max_examples=examples)
    @given(data=messages(kind_of(METHODS[path])))
    def hostile(data: bytes) -> None:
        assert outcome(channel, path, data) in {"OK", *TYPED}

    hostile()


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_any_bytes_get_a_reply_or_a_typed_error(channel: grpc.Channel, path: str, examples: int) -> None:
    @settings(SETTINGS, max_examples=examples)
    @given(data=st.binary(min_size=1, max_size=100))
    def hostile(data: bytes) -> None:
        assert outcome(channel, path, data) in {"OK", *TYPED}

    hostile()
