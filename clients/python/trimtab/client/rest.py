"""The HTTP transport: each verb as its route, by the stock `openai` SDK, which keeps connections, retries and reads streams.

It asks again before the first byte of a reply alone, and never when the server says `x-should-retry: false`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, TypeVar

import httpx2
import openai
from openai import BaseModel
from openai._models import FinalRequestOptions

from trimtab.client import calls
from trimtab.client.calls import Verb
from trimtab.client.experiment_calls import Ask

__all__ = ["AsyncRest", "Rest"]

Model = TypeVar("Model", bound=BaseModel)
_GENERATE: dict[Verb, str] = {
    "chat": "/chat/completions",
    "completion": "/completions",
    "compare": "/steering/compare",
}


class Rest:
    """Over one `openai.OpenAI`."""

    def __init__(self, sdk: openai.OpenAI) -> None:
        self.sdk = sdk

    def generate(self, verb: Verb, body: Mapping[str, Any], reply: type[Model]) -> Model:
        """A reply in one piece."""
        with calls.typed_errors():
            return self.sdk.post(_GENERATE[verb], cast_to=reply, body=body)

    def stream(self, verb: Verb, body: Mapping[str, Any], chunk: type[Model]) -> RestChunks[Model]:
        """A reply in chunks."""
        with calls.typed_errors():
            stream_type = openai.Stream[chunk]  # type: ignore[valid-type]
            chunks = self.sdk.post(_GENERATE[verb], cast_to=object, body=body, stream=True, stream_cls=stream_type)
        return RestChunks(chunks)

    def ask(self, verb: Verb, body: Mapping[str, Any]) -> Any:
        """The JSON of an answer."""
        with calls.typed_errors():
            match verb, body:
                case "bundles", _:
                    return self.sdk.get("/steering/bundles", cast_to=object)
                case "bundle", {"name": name}:
                    return self.sdk.get(calls.bundle_path(name), cast_to=object)
                case "load", {"data": data, "replace": replace, "pin": pin}:
                    options = calls.upload(replace, pin)
                    return self.sdk.post("/steering/bundles", cast_to=object, content=data, options=options)
                case "unload", {"name": name}:
                    return self.sdk.delete(calls.bundle_path(name), cast_to=object)
                case "pin", {"name": name, "pinned": pinned}:
                    ask = self.sdk.put if pinned else self.sdk.delete
                    return ask(f"{calls.bundle_path(name)}/pin", cast_to=object)
                case _:
                    return self.sdk.post(f"/steering/{verb}", cast_to=object, body=body)

    def call(self, ask: Ask) -> Any:
        """The JSON of a route outside the OpenAI API."""
        with calls.typed_errors():
            return self.sdk.request(object, _options(self.sdk, ask))

    def text(self, ask: Ask) -> tuple[str, Mapping[str, str]]:
        """Likewise, the text of its answer, and its headers."""
        with calls.typed_errors():
            answer = self.sdk.request(httpx2.Response, _options(self.sdk, ask))
        return answer.text, answer.headers

    def close(self) -> None:
        """Closes the connections."""
        self.sdk.close()


class RestChunks(Iterator[Model]):
    """The chunks of a reply as they come."""

    def __init__(self, chunks: openai.Stream[Model]) -> None:
        self._chunks = chunks

    def __next__(self) -> Model:
        with calls.typed_errors():
            return next(self._chunks)

    def close(self) -> None:
        """Stops the reply; the server aborts it."""
        self._chunks.close()


class AsyncRest:
    """Over one `openai.AsyncOpenAI`; otherwise as `Rest`."""

    def __init__(self, sdk: openai.AsyncOpenAI) -> None:
        self.sdk = sdk

    async def generate(self, verb: Verb, body: Mapping[str, Any], reply: type[Model]) -> Model:
        """A reply in one piece."""
        with calls.typed_errors():
            return await self.sdk.post(_GENERATE[verb], cast_to=reply, body=body)

    async def stream(self, verb: Verb, body: Mapping[str, Any], chunk: type[Model]) -> AsyncRestChunks[Model]:
        """A reply in chunks."""
        with calls.typed_errors():
            stream_type = openai.AsyncStream[chunk]  # type: ignore[valid-type]
            chunks = await self.sdk.post(
                _GENERATE[verb], cast_to=object, body=body, stream=True, stream_cls=stream_type
            )
        return AsyncRestChunks(chunks)

    async def ask(self, verb: Verb, body: Mapping[str, Any]) -> Any:
        """The JSON of an answer."""
        with calls.typed_errors():
            match verb, body:
                case "bundles", _:
                    return await self.sdk.get("/steering/bundles", cast_to=object)
                case "bundle", {"name": name}:
                    return await self.sdk.get(calls.bundle_path(name), cast_to=object)
                case "load", {"data": data, "replace": replace, "pin": pin}:
                    options = calls.upload(replace, pin)
                    return await self.sdk.post("/steering/bundles", cast_to=object, content=data, options=options)
                case "unload", {"name": name}:
                    return await self.sdk.delete(calls.bundle_path(name), cast_to=object)
                case "pin", {"name": name, "pinned": pinned}:
                    ask = self.sdk.put if pinned else self.sdk.delete
                    return await ask(f"{calls.bundle_path(name)}/pin", cast_to=object)
                case _:
                    return await self.sdk.post(f"/steering/{verb}", cast_to=object, body=body)

    async def call(self, ask: Ask) -> Any:
        """The JSON of a route outside the OpenAI API."""
        with calls.typed_errors():
            return await self.sdk.request(object, _options(self.sdk, ask))

    async def text(self, ask: Ask) -> tuple[str, Mapping[str, str]]:
        """Likewise, the text of its answer, and its headers."""
        with calls.typed_errors():
            answer = await self.sdk.request(httpx2.Response, _options(self.sdk, ask))
        return answer.text, answer.headers

    async def close(self) -> None:
        """Closes the connections."""
        await self.sdk.close()


class AsyncRestChunks(AsyncIterator[Model]):
    """The chunks of a reply as they come."""

    def __init__(self, chunks: openai.AsyncStream[Model]) -> None:
        self._chunks = chunks

    async def __anext__(self) -> Model:
        with calls.typed_errors():
            return await anext(self._chunks)

    async def close(self) -> None:
        """Stops the reply; the server aborts it."""
        await self._chunks.close()


def _options(sdk: openai.OpenAI | openai.AsyncOpenAI, ask: Ask) -> FinalRequestOptions:
    url = str(sdk.base_url.join("/")).rstrip("/") + ask.path
    return FinalRequestOptions(method=ask.method, url=url, json_data=ask.body, params=ask.params)
