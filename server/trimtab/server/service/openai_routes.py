"""The OpenAI routes over HTTP: generation, tokenizing, and the list of models with their aliases.

POST /v1/chat/completions  /v1/completions  /v1/responses  /v1/tokenize  /v1/detokenize
GET  /v1/models
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from trimtab.server.service import body
from trimtab.server.service.admission import admit
from trimtab.server.service.generation import Generation, Route, Streamed, checked, parsed
from trimtab.server.service.stream import Event

__all__ = ["add_openai_routes", "unless_gone"]

CLOSED_BY_CLIENT = 499
Result = TypeVar("Result")


def add_openai_routes(
    app: FastAPI, generation: Generation, models: OpenAIServingModels, tokenization: ServingTokenization
) -> None:
    """Serve what an OpenAI client expects."""

    def generates(route: Route) -> Callable[[Request], Awaitable[Response]]:
        async def reply(request: Request) -> Response:
            with generation.metrics.refusals():
                raw = await body.read(request.stream(), request.headers)
            asked = generation.admit(route, raw, request.state.request_id)
            result = await unless_gone(request, generation.run(asked))
            if result is None:
                return Response(status_code=CLOSED_BY_CLIENT)
            headers = _headers(result.steering)
            if isinstance(result, Streamed):
                events = with_sse_keep_alive(_texts(result.events), generation.keep_alive_seconds)
                headers["cache-control"] = "no-cache"
                return StreamingResponse(events, media_type="text/event-stream", headers=headers)
            return JSONResponse(result.document, headers=headers)

        return reply

    app.add_route("/v1/chat/completions", generates(generation.chat_route), methods=["POST"])
    app.add_route("/v1/completions", generates(generation.completion_route), methods=["POST"])
    app.add_route("/v1/responses", generates(generation.responses_route), methods=["POST"])

    async def list_models(_: Request) -> Response:
        cards = [card.model_dump() | {"root": card.id} for card in (await models.show_available_models()).data]
        aliases = [
            card | {"id": f"{card['id']}@{name}", "parent": card["id"]}
            for card in cards
            for name in sorted(generation.bundles)
        ]
        return JSONResponse({"object": "list", "data": cards + aliases})

    app.add_route("/v1/models", list_models, methods=["GET"])

    async def tokens(
        request: Request, kind: type[Any] | None, create: Callable[[Any, Any], Awaitable[Any]]
    ) -> Response:
        document = body.decode(await body.read(request.stream(), request.headers))
        model = kind or (TokenizeChatRequest if "messages" in document else TokenizeCompletionRequest)
        fields = model.model_fields.keys()
        admission = admit(document, fields=fields, models=generation.models, bundles=generation.bundles)
        found = await checked(create(parsed(model, admission.body), None))
        return JSONResponse(found.model_dump())

    async def tokenize(request: Request) -> Response:
        return await tokens(request, None, tokenization.create_tokenize)

    async def detokenize(request: Request) -> Response:
        return await tokens(request, DetokenizeRequest, tokenization.create_detokenize)

    app.add_route("/v1/tokenize", tokenize, methods=["POST"])
    app.add_route("/v1/detokenize", detokenize, methods=["POST"])


def _headers(steering: Mapping[str, Any]) -> dict[str, str]:
    headers = {"x-steering-status": str(steering["status"])}
    if "plan" in steering:
        headers["x-steering-plan"] = steering["plan"]
    if "experiment" in steering:
        headers["x-trimtab-experiment"] = "{key}={arm}".format(**steering["experiment"])
    return headers


async def _texts(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            yield event.text


async def unless_gone(request: Request, result: Coroutine[Any, Any, Result]) -> Result | None:
    """`result`, or None as soon as the client goes away: the engine then stops at the next step."""
    work = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
