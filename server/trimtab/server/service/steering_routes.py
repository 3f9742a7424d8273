"""The routes of steering over HTTP: what some edits would do, one prompt under several of them, and what latents read in a text.

POST /v1/steering/validate  /v1/steering/compare  /v1/steering/inspect
GET  /v1/steering/schema  /v1/steering/workers
"""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from trimtab.server.engine.handshake import prove
from trimtab.server.errors import InvalidSteering, Unsupported, Violation
from trimtab.server.service import body, compare
from trimtab.server.service.compare import Comparison
from trimtab.server.service.generation import Generation
from trimtab.server.service.inspect import Inspector
from trimtab.server.service.openai_routes import CLOSED_BY_CLIENT, unless_gone
from trimtab.server.service.problem import Problem, Refused
from trimtab.server.service.stream import DONE
from trimtab.server.steering import Steering

__all__ = ["add_steering_routes", "validation"]

_KINDS = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
_FIELDS = frozenset().union(*(kind.model_fields for kind in _KINDS))


def validation(generation: Generation, document: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation request with this `steering` would run; nothing is run.

    Raises:
        TrimtabError: it would be refused.
    """
    admission = generation.admission(document, _FIELDS, to_run=False)
    if admission.steered is None:
        raise InvalidSteering([Violation("steering", "is missing; give the field as a generation request would")])
    plan = admission.steered.plan
    return {
        "valid": True,
        "plan": plan.hash,
        "bundles": list(admission.steered.bundles),
        "hook_points": [f"blocks.{layer}.resid_post" for layer in plan.layers],
        "n_rows": len(plan.rows),
    }


def add_steering_routes(app: FastAPI, generation: Generation, inspector: Inspector) -> None:
    """Serve them."""

    async def validate(request: Request) -> Response:
        document = body.decode(await body.read(request.stream(), request.headers))
        return JSONResponse(validation(generation, document))

    app.add_route("/v1/steering/validate", validate, methods=["POST"])

    async def schema(_: Request) -> Response:
        return JSONResponse(Steering.model_json_schema())

    app.add_route("/v1/steering/schema", schema, methods=["GET"])

    async def workers(_: Request) -> Response:
        try:
            reports = await prove(generation.engine, [b.content_hash for b in generation.bundles.values()])
        except Unsupported as e:
            raise Refused(Problem(503, "not_proven", e.message)) from e
        return JSONResponse({"object": "list", "data": reports})

    app.add_route("/v1/steering/workers", workers, methods=["GET"])

    async def compare_arms(request: Request) -> Response:
        document = body.decode(await body.read(request.stream(), request.headers))
        streamed = document.get("stream") is True
        comparison = Comparison.admit(generation, document, request.state.request_id, streamed=streamed)
        if streamed:
            events = _events(generation, comparison)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        replies = await unless_gone(request, compare.run(generation, comparison))
        if replies is None:
            return Response(status_code=CLOSED_BY_CLIENT)
        arms = [{"name": name, "reply": reply} for name, reply in zip(comparison.names, replies, strict=True)]
        return JSONResponse({"object": "steering.comparison", "seed": comparison.seed, "arms": arms})

    app.add_route("/v1/steering/compare", compare_arms, methods=["POST"])

    async def inspect(request: Request) -> Response:
        document = body.decode(await body.read(request.stream(), request.headers))
        found = await unless_gone(request, inspector.inspect(document, request.state.request_id))
        return Response(status_code=CLOSED_BY_CLIENT) if found is None else JSONResponse(found)

    app.add_route("/v1/steering/inspect", inspect, methods=["POST"])


async def _events(generation: Generation, comparison: Comparison) -> AsyncGenerator[str, None]:
    try:
        async with aclosing(compare.stream(generation, comparison)) as pieces:
            async for arm, chunk in pieces:
                yield _event({"arm": arm, "name": comparison.names[arm], "seed": comparison.seed, "chunk": chunk})
    except Refused as e:
        yield _event(e.problem.document)
        return
    yield DONE


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n"
