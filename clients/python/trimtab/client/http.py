"""The synchronous client: the `openai` SDK's calls with `steering`, and what else a Trimtab server answers.

Over HTTP by default; `grpc://host:port` and `grpcs://host:port` take gRPC. The calls, their types and their errors are the same.
Written by `make client` from `aio`; do not edit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

import openai
from openai import BaseModel
from openai.types.chat import ChatCompletionMessageParam
from typing_extensions import Unpack

from trimtab.client import calls, comparison, inspection
from trimtab.client.bundles import (
    BundleLatent,
    BundleSummary,
    Validation,
    read_bundle,
    read_bundles,
    read_latents,
    read_validation,
)
from trimtab.client.calls import (
    ChatParams,
    ChatStreamParams,
    CompletionParams,
    CompletionStreamParams,
    Ending,
    Verb,
)
from trimtab.client.comparison import Arms, Comparison, Gathered, Piece, RawPiece
from trimtab.client.errors import NotAppliedError, UnsupportedError
from trimtab.client.experiment_routes import ExperimentRoutes, OutcomeRoutes
from trimtab.client.inspection import Inspection
from trimtab.client.proof import Applied, require_applied
from trimtab.client.replies import SteeredChatChunk, SteeredChatCompletion, SteeredCompletion
from trimtab.client.rest import Rest
from trimtab.client.spec import Steering

if TYPE_CHECKING:
    from trimtab.client.rest import RestChunks
    from trimtab.client.rpc import Grpc, GrpcChunks

__all__ = ["ComparisonStream", "Trimtab", "TrimtabStream"]

Chunk = TypeVar("Chunk", bound=BaseModel)
Reply = TypeVar("Reply", bound=BaseModel)


class Trimtab:
    """A Trimtab server. Thread-safe; close it, or use it as a context manager.

    `http_client` is the `openai` SDK's; `channel` is a `grpc.Channel` of your own, for certificates and the like.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        http_client: Any = None,
        channel: Any = None,
    ) -> None:
        self._wire: Rest | Grpc
        if calls.is_grpc(base_url):
            from trimtab.client import rpc

            self._wire = rpc.Grpc(channel or rpc.channel(base_url, max_retries), calls.key(api_key), timeout)
        else:
            self._wire = Rest(
                openai.OpenAI(
                    base_url=calls.root(base_url),
                    api_key=calls.key(api_key),
                    timeout=timeout,
                    max_retries=max_retries,
                    http_client=http_client,
                )
            )
        self.chat = Chat(self._wire)
        self.completions = Completions(self._wire)
        self.steering = SteeringRoutes(self._wire)
        self.experiments = ExperimentRoutes(self._wire)
        self.outcomes = OutcomeRoutes(self._wire)

    @property
    def openai(self) -> openai.OpenAI:
        """The stock SDK client of the same server, for all else it can do; `Steering.openai()` makes it steer.

        Raises:
            UnsupportedError: the client speaks gRPC.
        """
        if not isinstance(self._wire, Rest):
            raise UnsupportedError("the openai SDK speaks HTTP; give the server's HTTP address")
        return self._wire.sdk

    def compare(
        self,
        arms: Arms,
        *,
        model: str,
        messages: Iterable[ChatCompletionMessageParam] | None = None,
        prompt: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        extra_body: Mapping[str, object] | None = None,
    ) -> Comparison:
        """One prompt with one seed under several steerings, run side by side.

        Raises:
            TrimtabError: what was asked for is wrong or was not done, with the arm at fault.
        """
        with self.compare_stream(
            arms,
            model=model,
            messages=messages,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            extra_body=extra_body,
        ) as stream:
            for _ in stream:
                pass
            return stream.comparison

    def compare_stream(
        self,
        arms: Arms,
        *,
        model: str,
        messages: Iterable[ChatCompletionMessageParam] | None = None,
        prompt: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        extra_body: Mapping[str, object] | None = None,
    ) -> ComparisonStream:
        """`compare`, as it comes."""
        params = {
            "model": model,
            "messages": None if messages is None else list(messages),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        request = comparison.body(arms, params, extra_body)
        return ComparisonStream(self._wire.stream("compare", request, RawPiece), arms)

    def close(self) -> None:
        """Closes the connections."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ComparisonStream:
    """The pieces of a comparison's arms as they come; when it is complete, `comparison` is all of it."""

    def __init__(self, chunks: RestChunks[RawPiece] | GrpcChunks[RawPiece], arms: Arms) -> None:
        self._chunks = chunks
        self._gathered = Gathered(arms)
        self._whole: Comparison | None = None

    def __iter__(self) -> Iterator[Piece]:
        for raw in self._chunks:
            yield self._gathered.saw(raw)
        self._whole = self._gathered.whole()

    @property
    def comparison(self) -> Comparison:
        """What all arms said; known when the stream is complete.

        Raises:
            NotAppliedError: it is not.
        """
        if self._whole is None:
            raise NotAppliedError(
                "the comparison is not complete; read it to the end, its last pieces carry the proofs"
            )
        return self._whole

    def close(self) -> None:
        """Stops all arms; the server aborts them."""
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TrimtabStream(Generic[Chunk]):
    """The chunks of a reply; when it is complete, `steering` is what was applied."""

    def __init__(self, chunks: RestChunks[Chunk] | GrpcChunks[Chunk], steering: Steering | None) -> None:
        self._chunks = chunks
        self._ending = Ending(steering)

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in self._chunks:
            self._ending.saw(chunk)
            yield chunk
        self._ending.ended()

    @property
    def steering(self) -> Applied:
        """What was applied; known when the stream is complete.

        Raises:
            NotAppliedError: the stream is not complete, or carried no proof.
        """
        return self._ending.proof

    def close(self) -> None:
        """Stops the reply; the server aborts it."""
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Chat:
    """`client.chat.completions`, as in the SDK."""

    def __init__(self, wire: Rest | Grpc) -> None:
        self.completions = ChatCompletions(wire)


class ChatCompletions:
    """Chat replies."""

    def __init__(self, wire: Rest | Grpc) -> None:
        self._wire = wire

    @overload
    def create(
        self,
        *,
        steering: Steering | None = None,
        extra_body: Mapping[str, object] | None = None,
        **params: Unpack[ChatParams],
    ) -> SteeredChatCompletion: ...

    @overload
    def create(
        self,
        *,
        steering: Steering | None = None,
        extra_body: Mapping[str, object] | None = None,
        **params: Unpack[ChatStreamParams],
    ) -> TrimtabStream[SteeredChatChunk]: ...

    def create(
        self, *, steering: Steering | None = None, extra_body: Mapping[str, object] | None = None, **params: Any
    ) -> SteeredChatCompletion | TrimtabStream[SteeredChatChunk]:
        """A chat reply, steered; `params` are the SDK's own. A steered reply without proof is an error, unless open.

        Raises:
            TrimtabError: what was asked for is wrong or was not done; see `errors`.
            openai.APIError: everything else.
        """
        request = calls.body(steering, extra_body, params)
        return _send(self._wire, "chat", request, steering, SteeredChatCompletion, SteeredChatChunk)


class Completions:
    """Text replies."""

    def __init__(self, wire: Rest | Grpc) -> None:
        self._wire = wire

    @overload
    def create(
        self,
        *,
        steering: Steering | None = None,
        extra_body: Mapping[str, object] | None = None,
        **params: Unpack[CompletionParams],
    ) -> SteeredCompletion: ...

    @overload
    def create(
        self,
        *,
        steering: Steering | None = None,
        extra_body: Mapping[str, object] | None = None,
        **params: Unpack[CompletionStreamParams],
    ) -> TrimtabStream[SteeredCompletion]: ...

    def create(
        self, *, steering: Steering | None = None, extra_body: Mapping[str, object] | None = None, **params: Any
    ) -> SteeredCompletion | TrimtabStream[SteeredCompletion]:
        """A text reply, steered; otherwise as `chat.completions.create`."""
        request = calls.body(steering, extra_body, params)
        return _send(self._wire, "completion", request, steering, SteeredCompletion, SteeredCompletion)


class SteeringRoutes:
    """`/v1/steering`: what can be steered, and whether a request would be."""

    def __init__(self, wire: Rest | Grpc) -> None:
        self._wire = wire

    def bundles(self) -> tuple[BundleSummary, ...]:
        """The bundles that are loaded, by name."""
        return read_bundles(self._wire.ask("bundles", {}))

    def latents(self, bundle: str) -> tuple[BundleLatent, ...]:
        """The latents that a bundle holds, with their evidence.

        Raises:
            UnknownBundleError: the bundle is not loaded.
        """
        return read_latents(self._wire.ask("bundle", {"name": bundle}))

    def load(self, bundle: bytes, *, replace: bool = False, pin: bool = False) -> BundleSummary:
        """The bundle of these bytes (those of its file), now in every worker; loading it again changes nothing.

        A server started with `--allow-bundle-upload` takes it without a pause. Requests that run on a replaced bundle keep it.

        Raises:
            InvalidBundleError: the bytes are no bundle, or one of another model.
            ConflictError: another bundle has its name, and is not to be replaced, or is pinned.
            openai.PermissionDeniedError: the server takes none.
        """
        return read_bundle(self._wire.ask("load", {"data": bundle, "replace": replace, "pin": pin}))

    def unload(self, bundle: str) -> None:
        """No request can name the bundle from now on; those that run on it keep it to their end.

        Raises:
            UnknownBundleError: the bundle is not loaded.
            ConflictError: it is pinned.
        """
        self._wire.ask("unload", {"name": bundle})

    def pin(self, bundle: str) -> BundleSummary:
        """The bundle, which can be neither replaced nor removed now."""
        return read_bundle(self._wire.ask("pin", {"name": bundle, "pinned": True}))

    def unpin(self, bundle: str) -> BundleSummary:
        """The bundle, which can be replaced and removed again."""
        return read_bundle(self._wire.ask("pin", {"name": bundle, "pinned": False}))

    def validate(self, steering: Steering) -> Validation:
        """The plan that the server makes of these edits; nothing is run.

        Raises:
            InvalidSteeringError: it refuses them, and says why.
            UnknownBundleError: a bundle is not loaded.
        """
        return read_validation(self._wire.ask("validate", calls.body(steering, None, {})))

    def inspect(
        self,
        bundle: str,
        *,
        prompt: str | Sequence[int] | None = None,
        messages: Iterable[ChatCompletionMessageParam] | None = None,
        top_count: int = 5,
        steering: Steering | None = None,
    ) -> Inspection:
        """The latents of a bundle that are most active on each token of a text, which the engine runs once for that.

        Raises:
            UnknownBundleError: the bundle is not loaded.
            NotAppliedError: it was to be run under edits, and was not.
        """
        request = inspection.body(bundle, prompt, messages, top_count, steering)
        found = self._wire.ask("inspect", request)
        if calls.must_be_applied(steering):
            require_applied(found)
        return inspection.read_inspection(found)


def _send(
    wire: Rest | Grpc,
    verb: Verb,
    request: dict[str, Any],
    steering: Steering | None,
    reply_type: type[Reply],
    chunk_type: type[Chunk],
) -> Reply | TrimtabStream[Chunk]:
    if request.get("stream"):
        return TrimtabStream(wire.stream(verb, request, chunk_type), steering)
    reply = wire.generate(verb, request, reply_type)
    if calls.must_be_applied(steering):
        require_applied(reply)
    return reply
