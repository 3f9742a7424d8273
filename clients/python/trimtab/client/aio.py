"""The asynchronous client: `http` with `await`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

import openai
from typing_extensions import Unpack

from trimtab.client import calls
from trimtab.client.bundles import (
    BundleLatent,
    BundleSummary,
    Validation,
    read_bundle,
    read_bundles,
    read_latents,
    read_validation,
)
from trimtab.client.calls import ChatParams, ChatStreamParams, CompletionParams, CompletionStreamParams, Ending
from trimtab.client.proof import Applied, require_applied
from trimtab.client.replies import SteeredChatChunk, SteeredChatCompletion, SteeredCompletion
from trimtab.client.spec import Steering

__all__ = ["AsyncTrimtab", "AsyncTrimtabStream"]

Chunk = TypeVar("Chunk")
Reply = TypeVar("Reply")


class AsyncTrimtab:
    """A Trimtab server. Close it, or use it as a context manager."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        http_client: Any = None,
    ) -> None:
        self.openai = openai.AsyncOpenAI(
            base_url=calls.root(base_url),
            api_key=calls.key(api_key),
            timeout=timeout,
            max_retries=max_retries,
            http_client=http_client,
        )
        """The stock SDK client of the same server, for all else it can do; `Steering.openai()` makes it steer."""
        self.chat = AsyncChat(self.openai)
        self.completions = AsyncCompletions(self.openai)
        self.steering = AsyncSteeringRoutes(self.openai)

    async def close(self) -> None:
        """Closes the connections."""
        await self.openai.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncTrimtabStream(Generic[Chunk]):
    """The chunks of a reply; when it is complete, `steering` is what was applied."""

    def __init__(self, chunks: openai.AsyncStream[Chunk], steering: Steering | None) -> None:
        self._chunks = chunks
        self._ending = Ending(steering)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        with calls.typed_errors():
            async for chunk in self._chunks:
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

    async def close(self) -> None:
        """Stops the reply; the server aborts it."""
        await self._chunks.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncChat:
    """`client.chat.completions`, as in the SDK."""

    def __init__(self, sdk: openai.AsyncOpenAI) -> None:
        self.completions = AsyncChatCompletions(sdk)


class AsyncChatCompletions:
    """Chat replies."""

    def __init__(self, sdk: openai.AsyncOpenAI) -> None:
        self._sdk = sdk

    @overload
    async def create(
        self,
        *,
        steering: Steering | None = None,
        extra_body: Mapping[str, object] | None = None,
        **params: Unpack[ChatParams],
    ) -> SteeredChatCompletion: ...

    @overload
    async def create(
        self,
        *,
        steering: Steering | None = None,
        extra_body: Mapping[str, object] | None = None,
        **params: Unpack[ChatStreamParams],
    ) -> AsyncTrimtabStream[SteeredChatChunk]: ...

    async def create(
        self, *, steering: Steering | None = None, extra_body: Mapping[str, object] | None = None, **params: Any
    ) -> SteeredChatCompletion | AsyncTrimtabStream[SteeredChatChunk]:
        """A chat reply, steered; `params` are the SDK's own. A steered reply without proof is an error, unless open.

        Raises:
            TrimtabError: what was asked for is wrong or was not done; see `errors`.
            openai.APIError: everything else.
        """
        request = calls.body(steering, extra_body, params)
        chunks = openai.AsyncStream[SteeredChatChunk]
        return await _send(self._sdk, "/chat/completions", request, steering, SteeredChatCompletion, chunks)


class AsyncCompletions:
    """Text replies."""

    def __init__(self, sdk: openai.AsyncOpenAI) -> None:
        self._sdk = sdk

    @overload
    async def create(
        self,
        *,
        steering: Steering | None = None,
        extra_body: Mapping[str, object] | None = None,
        **params: Unpack[CompletionParams],
    ) -> SteeredCompletion: ...

    @overload
    async def create(
        self,
        *,
        steering: Steering | None = None,
        extra_body: Mapping[str, object] | None = None,
        **params: Unpack[CompletionStreamParams],
    ) -> AsyncTrimtabStream[SteeredCompletion]: ...

    async def create(
        self, *, steering: Steering | None = None, extra_body: Mapping[str, object] | None = None, **params: Any
    ) -> SteeredCompletion | AsyncTrimtabStream[SteeredCompletion]:
        """A text reply, steered; otherwise as `chat.completions.create`."""
        request = calls.body(steering, extra_body, params)
        chunks = openai.AsyncStream[SteeredCompletion]
        return await _send(self._sdk, "/completions", request, steering, SteeredCompletion, chunks)


class AsyncSteeringRoutes:
    """`/v1/steering`: what can be steered, and whether a request would be."""

    def __init__(self, sdk: openai.AsyncOpenAI) -> None:
        self._sdk = sdk

    async def bundles(self) -> tuple[BundleSummary, ...]:
        """The bundles that are loaded, by name."""
        with calls.typed_errors():
            return read_bundles(await self._sdk.get("/steering/bundles", cast_to=object))

    async def latents(self, bundle: str) -> tuple[BundleLatent, ...]:
        """The latents that a bundle holds, with their evidence.

        Raises:
            UnknownBundleError: the bundle is not loaded.
        """
        with calls.typed_errors():
            return read_latents(await self._sdk.get(calls.bundle_path(bundle), cast_to=object))

    async def load(self, bundle: bytes, *, replace: bool = False, pin: bool = False) -> BundleSummary:
        """The bundle of these bytes (those of its file), now in every worker; loading it again changes nothing.

        A server started with `--allow-bundle-upload` takes it without a pause. Requests that run on a replaced bundle keep it.

        Raises:
            InvalidBundleError: the bytes are no bundle, or one of another model.
            ConflictError: another bundle has its name, and is not to be replaced, or is pinned.
            openai.PermissionDeniedError: the server takes none.
        """
        with calls.typed_errors():
            return read_bundle(
                await self._sdk.post(
                    "/steering/bundles", cast_to=object, content=bundle, options=calls.upload(replace, pin)
                )
            )

    async def unload(self, bundle: str) -> None:
        """No request can name the bundle from now on; those that run on it keep it to their end.

        Raises:
            UnknownBundleError: the bundle is not loaded.
            ConflictError: it is pinned.
        """
        with calls.typed_errors():
            await self._sdk.delete(calls.bundle_path(bundle), cast_to=object)

    async def pin(self, bundle: str) -> BundleSummary:
        """The bundle, which can be neither replaced nor removed now."""
        with calls.typed_errors():
            return read_bundle(await self._sdk.put(f"{calls.bundle_path(bundle)}/pin", cast_to=object))

    async def unpin(self, bundle: str) -> BundleSummary:
        """The bundle, which can be replaced and removed again."""
        with calls.typed_errors():
            return read_bundle(await self._sdk.delete(f"{calls.bundle_path(bundle)}/pin", cast_to=object))

    async def validate(self, steering: Steering) -> Validation:
        """The plan that the server makes of these edits; nothing is run.

        Raises:
            InvalidSteeringError: it refuses them, and says why.
            UnknownBundleError: a bundle is not loaded.
        """
        with calls.typed_errors():
            return read_validation(
                await self._sdk.post("/steering/validate", cast_to=object, body=calls.body(steering, None, {}))
            )


async def _send(
    sdk: openai.AsyncOpenAI,
    path: str,
    request: dict[str, Any],
    steering: Steering | None,
    reply_type: type[Reply],
    stream_type: type[openai.AsyncStream[Chunk]],
) -> Reply | AsyncTrimtabStream[Chunk]:
    with calls.typed_errors():
        if request.get("stream"):
            chunks = await sdk.post(path, cast_to=object, body=request, stream=True, stream_cls=stream_type)
            return AsyncTrimtabStream(chunks, steering)
        reply = await sdk.post(path, cast_to=reply_type, body=request)
    if calls.must_be_applied(steering):
        require_applied(reply)
    return reply
