"""The gRPC transport: each verb as its call of `trimtab.v1` (`pip install 'trimtab[grpc]'`).

gRPC itself asks again while nothing of a reply has come and the server is unavailable, at most `max_retries` times.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
from google.rpc import error_details_pb2 as details
from grpc_status import rpc_status
from openai import BaseModel

from trimtab.client import messages
from trimtab.client.calls import Verb
from trimtab.client.errors import CallError, TrimtabError, UnsupportedError, Violation
from trimtab.client.experiment_calls import Ask
from trimtab.v1 import inference_pb2 as inference
from trimtab.v1 import steering_service_pb2 as service
from trimtab.v1.inference_pb2_grpc import InferenceServiceStub
from trimtab.v1.steering_service_pb2_grpc import SteeringServiceStub

__all__ = ["AsyncGrpc", "Grpc", "async_channel", "channel"]

Model = TypeVar("Model", bound=BaseModel)


class Grpc:
    """Over one channel."""

    def __init__(self, channel: grpc.Channel, key: str, timeout: float) -> None:
        self._channel = channel
        self._options: dict[str, Any] = {"metadata": (("authorization", f"Bearer {key}"),), "timeout": timeout}
        self._stubs = _Stubs(channel)

    def generate(self, verb: Verb, body: Mapping[str, Any], reply: type[Model]) -> Model:
        """A reply in one piece."""
        request = _request(verb, body)
        with _typed_errors():
            message, call = self._stubs.whole(verb).with_call(request, **self._options)
        return _named(reply.construct(**_document(message, chunk=False)), call.trailing_metadata())

    def stream(self, verb: Verb, body: Mapping[str, Any], chunk: type[Model]) -> GrpcChunks[Model]:
        """A reply in chunks."""
        return GrpcChunks(self._stubs.streamed(verb)(_request(verb, body), **self._options), chunk)

    def ask(self, verb: Verb, body: Mapping[str, Any]) -> Any:
        """The JSON of an answer."""
        call, request, read = self._stubs.answer(verb, body)
        with _typed_errors():
            return read(call(request, **self._options))

    def call(self, ask: Ask) -> Any:
        """
        Raises:
            UnsupportedError: always; only HTTP has these routes.
        """
        raise _http_only(ask)

    def text(self, ask: Ask) -> tuple[str, Mapping[str, str]]:
        """Likewise."""
        raise _http_only(ask)

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


def _http_only(ask: Ask) -> UnsupportedError:
    return UnsupportedError(f"this client asks for {ask.path} over HTTP alone; give the server's HTTP address")


class GrpcChunks(Iterator[Model]):
    """The chunks of a reply as they come."""

    def __init__(self, call: Any, chunk: type[Model]) -> None:
        self._call = call
        self._chunk = chunk

    def __next__(self) -> Model:
        with _typed_errors():
            message = next(self._call)
        return self._chunk.construct(**_document(message, chunk=True))

    def close(self) -> None:
        """Stops the reply; the server aborts it."""
        self._call.cancel()


class AsyncGrpc:
    """Over one channel of `grpc.aio`; otherwise as `Grpc`."""

    def __init__(self, channel: grpc.aio.Channel, key: str, timeout: float) -> None:
        self._channel = channel
        self._options: dict[str, Any] = {"metadata": (("authorization", f"Bearer {key}"),), "timeout": timeout}
        self._stubs = _Stubs(channel)

    async def generate(self, verb: Verb, body: Mapping[str, Any], reply: type[Model]) -> Model:
        """A reply in one piece."""
        call = self._stubs.whole(verb)(_request(verb, body), **self._options)
        with _typed_errors():
            message = await call
        return _named(reply.construct(**_document(message, chunk=False)), await call.trailing_metadata())

    async def stream(self, verb: Verb, body: Mapping[str, Any], chunk: type[Model]) -> AsyncGrpcChunks[Model]:
        """A reply in chunks."""
        return AsyncGrpcChunks(self._stubs.streamed(verb)(_request(verb, body), **self._options), chunk)

    async def ask(self, verb: Verb, body: Mapping[str, Any]) -> Any:
        """The JSON of an answer."""
        call, request, read = self._stubs.answer(verb, body)
        with _typed_errors():
            return read(await call(request, **self._options))

    async def call(self, ask: Ask) -> Any:
        """
        Raises:
            UnsupportedError: always; only HTTP has these routes.
        """
        raise _http_only(ask)

    async def text(self, ask: Ask) -> tuple[str, Mapping[str, str]]:
        """Likewise."""
        raise _http_only(ask)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()


class AsyncGrpcChunks(AsyncIterator[Model]):
    """The chunks of a reply as they come."""

    def __init__(self, call: Any, chunk: type[Model]) -> None:
        self._call = call
        self._messages: AsyncIterator[Any] = aiter(call)
        self._chunk = chunk

    async def __anext__(self) -> Model:
        with _typed_errors():
            message = await anext(self._messages)
        return self._chunk.construct(**_document(message, chunk=True))

    async def close(self) -> None:
        """Stops the reply; the server aborts it."""
        self._call.cancel()


class _Stubs:
    """The calls of a channel by verb; they are the same for both kinds of channel."""

    def __init__(self, channel: Any) -> None:
        self._inference: Any = InferenceServiceStub(channel)
        self._steering: Any = SteeringServiceStub(channel)

    def whole(self, verb: Verb) -> Any:
        """A generation in one piece."""
        return self._inference.ChatComplete if verb == "chat" else self._inference.Generate

    def streamed(self, verb: Verb) -> Any:
        """A generation as it comes."""
        match verb:
            case "chat":
                return self._inference.StreamChatComplete
            case "compare":
                return self._inference.Compare
            case _:
                return self._inference.StreamGenerate

    def answer(self, verb: Verb, body: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """The call, its request, and what reads its answer as JSON."""
        match verb, body:
            case "validate", {"steering": field}:
                request = service.ValidateRequest(steering=messages.steering(field))
                return self._steering.Validate, request, messages.validation_json
            case "inspect", _:
                return self._steering.Inspect, messages.inspect(body), messages.inspection_json
            case "bundles", _:
                return self._steering.ListBundles, service.ListBundlesRequest(), _listing
            case "bundle", {"name": name}:
                return self._steering.GetBundle, service.GetBundleRequest(name=name), messages.bundle_json
            case _:
                raise UnsupportedError(f"{verb} is not served over gRPC; use the server's HTTP address for it")


def _listing(reply: service.ListBundlesResponse) -> dict[str, Any]:
    return {"data": [messages.summary_json(bundle) for bundle in reply.bundles]}


def _request(verb: Verb, body: Mapping[str, Any]) -> Any:
    match verb:
        case "chat":
            return messages.chat_complete(body)
        case "compare":
            return messages.compare(body)
        case _:
            return messages.generate(body)


def _document(message: Any, *, chunk: bool) -> dict[str, Any]:
    match message:
        case inference.GenerateResponse():
            return messages.text_json(message)
        case inference.CompareResponse():
            return messages.piece_json(message)
        case _:
            return messages.chat_json(message, chunk=chunk)


def _named(reply: Model, metadata: Any) -> Model:
    reply._request_id = dict(metadata or ()).get("x-request-id")
    return reply


@contextmanager
def _typed_errors() -> Iterator[None]:
    """A call that failed, raised as this package's own errors, with what its status says."""
    try:
        yield
    except grpc.RpcError as e:
        raise _error(e) from e


def _error(error: Any) -> TrimtabError:
    info, bad, retry = details.ErrorInfo(), details.BadRequest(), details.RetryInfo()
    status = rpc_status.from_call(error)
    for detail in () if status is None else status.details:
        for known in (info, bad, retry):
            detail.Unpack(known)
    violations = tuple(Violation(_field(v.field), v.description) for v in bad.field_violations)
    fields: dict[str, Any] = {
        "param": violations[0].field if violations else None,
        "violations": violations if info.reason.startswith("INVALID_") else (),
        "request_id": info.metadata.get("request_id"),
    }
    message = error.details() or str(error.code())
    if (kind := TrimtabError.kind(info.reason.lower())) is not None:
        return kind(message, **fields)
    return CallError(message, code=(info.reason or error.code().name).lower(), grpc_code=error.code().name, **fields)


def _field(path: str) -> str:
    """The field of the HTTP API whose place in a message this is: one spelling for users of both."""
    return path.replace(".free_form.edits", ".edits").removeprefix("sampling.").removeprefix("options.")


def _arguments(base_url: str, max_retries: int) -> tuple[str, bool, list[tuple[str, Any]]]:
    parts = urlsplit(base_url)
    policy = {
        "maxAttempts": max_retries + 1,
        "initialBackoff": "0.5s",
        "maxBackoff": "8s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]} if max_retries > 0 else {}
    options = [("grpc.service_config", json.dumps(config)), ("grpc.enable_retries", int(max_retries > 0))]
    return parts.netloc, parts.scheme == "grpcs", options


def channel(base_url: str, max_retries: int) -> grpc.Channel:
    """A channel to `grpc://host:port`, or over TLS to `grpcs://host:port`."""
    address, secure, options = _arguments(base_url, max_retries)
    if secure:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(), options)
    return grpc.insecure_channel(address, options)


def async_channel(base_url: str, max_retries: int) -> grpc.aio.Channel:
    """As `channel`, of `grpc.aio`."""
    address, secure, options = _arguments(base_url, max_retries)
    if secure:
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options)
    return grpc.aio.insecure_channel(address, options)
