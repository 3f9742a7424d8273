"""`InferenceService`: the generation routes of the HTTP API, in messages."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from trimtab.server.service import compare
from trimtab.server.service.compare import Comparison
from trimtab.server.service.generation import Generation, Route, Streamed, Whole
from trimtab.server.service.problem import Refused
from trimtab.server.service.rpc import replies, requests
from trimtab.server.service.rpc.calls import Call, Calls
from trimtab.v1 import inference_pb2 as v1
from trimtab.v1.inference_pb2_grpc import InferenceServiceServicer

__all__ = ["Inference"]


class Inference(InferenceServiceServicer):  # type: ignore[misc] # generated without types
    """Steered generation."""

    def __init__(self, generation: Generation, calls: Calls) -> None:
        self._generation = generation
        self._calls = calls

    async def Generate(self, request: v1.GenerateRequest, context: Any) -> v1.GenerateResponse:
        """A continuation in one piece."""
        async with self._calls.begun(context, lambda field: requests.path(field, prompt=_prompt(request))) as call:
            with self._generation.metrics.refusals():
                body = requests.generate(request, stream=False)
            return replies.generate(await self._whole(self._generation.completion_route, body, call))

    async def StreamGenerate(self, request: v1.GenerateRequest, context: Any) -> AsyncIterator[v1.GenerateResponse]:
        """A continuation as it comes."""
        async with self._calls.begun(context, lambda field: requests.path(field, prompt=_prompt(request))) as call:
            with self._generation.metrics.refusals():
                body = requests.generate(request, stream=True)
            async with aclosing(self._chunks(self._generation.completion_route, body, call)) as chunks:
                async for chunk in chunks:
                    yield replies.generate(chunk)

    async def ChatComplete(self, request: v1.ChatCompleteRequest, context: Any) -> v1.ChatCompleteResponse:
        """An answer in one piece."""
        async with self._calls.begun(context, requests.path) as call:
            with self._generation.metrics.refusals():
                body = requests.chat_complete(request, stream=False)
            return replies.chat_complete(await self._whole(self._generation.chat_route, body, call))

    async def StreamChatComplete(
        self, request: v1.ChatCompleteRequest, context: Any
    ) -> AsyncIterator[v1.ChatCompleteResponse]:
        """An answer as it comes."""
        async with self._calls.begun(context, requests.path) as call:
            with self._generation.metrics.refusals():
                body = requests.chat_complete(request, stream=True)
            async with aclosing(self._chunks(self._generation.chat_route, body, call)) as chunks:
                async for chunk in chunks:
                    yield replies.chat_complete(chunk)

    async def Compare(self, request: v1.CompareRequest, context: Any) -> AsyncIterator[v1.CompareResponse]:
        """The arms as they come, side by side."""
        kind = request.WhichOneof("request")
        prompt = _prompt(request.generate) if kind == "generate" else "text"
        async with self._calls.begun(context, lambda field: requests.compare_path(field, kind, prompt)) as call:
            with self._generation.metrics.refusals():
                body = requests.compare(request)
            comparison = Comparison.admit(self._generation, body, call.id, streamed=True)
            async with aclosing(compare.stream(self._generation, comparison)) as pieces:
                async for arm, chunk in pieces:
                    reply = v1.CompareResponse(arm=arm, name=comparison.names[arm], seed=comparison.seed)
                    if kind == "generate":
                        reply.generate.CopyFrom(replies.generate(chunk))
                    else:
                        reply.chat.CopyFrom(replies.chat_complete(chunk))
                    yield reply

    async def _whole(self, route: Route, body: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
        result = await self._generation.run(self._generation.admit(route, body, call.id))
        call.told(result.steering)
        assert isinstance(result, Whole)
        return result.document

    async def _chunks(
        self, route: Route, body: Mapping[str, Any], call: Call
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        result = await self._generation.run(self._generation.admit(route, body, call.id))
        call.told(result.steering)
        assert isinstance(result, Streamed)
        async with aclosing(result.events) as events:
            async for event in events:
                if event.problem is not None:
                    raise Refused(event.problem)
                if event.document is not None:
                    yield event.document


def _prompt(request: v1.GenerateRequest) -> str:
    return request.WhichOneof("prompt") or "prompt"
