"""The app: an allow-list of routes, and nothing of vLLM's own app.

POST /v1/chat/completions  /v1/completions  /v1/steering/validate
GET  /v1/models  /v1/steering/schema  /livez  /readyz  /metrics
and those of the bundles, in `bundle_routes`
"""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from trimtab.server.errors import InvalidSteering, TrimtabError, Violation
from trimtab.server.service import body
from trimtab.server.service.admission import admit
from trimtab.server.service.bundle_routes import add_bundle_routes
from trimtab.server.service.edge import Drain, Edge
from trimtab.server.service.generation import Generation, Refused
from trimtab.server.service.problem import Problem, of_error
from trimtab.server.service.shelf import Shelf
from trimtab.server.steering import Steering

__all__ = ["build"]

_FIELDS = frozenset(ChatCompletionRequest.model_fields) | frozenset(CompletionRequest.model_fields)


def build(
    generation: Generation,
    shelf: Shelf,
    models: OpenAIServingModels,
    registry: CollectorRegistry,
    *,
    key: bytes | None,
    drain: Drain,
) -> FastAPI:
    """The app over a running engine; `key` is the digest of the API key, None for a server without one."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Edge, key=key, drain=drain)
    _problems(app)
    bundles = generation.bundles

    app.add_route("/v1/chat/completions", generation.chat_completions, methods=["POST"])
    app.add_route("/v1/completions", generation.completions, methods=["POST"])

    async def list_models(_: Request) -> Response:
        cards = [card.model_dump() | {"root": card.id} for card in (await models.show_available_models()).data]
        aliases = [
            card | {"id": f"{card['id']}@{name}", "parent": card["id"]} for card in cards for name in sorted(bundles)
        ]
        return JSONResponse({"object": "list", "data": cards + aliases})

    app.add_route("/v1/models", list_models, methods=["GET"])

    add_bundle_routes(app, shelf)

    async def validate(request: Request) -> Response:
        raw = await body.read(request.stream(), request.headers)
        document = body.decode(raw)
        admission = admit(document, fields=_FIELDS, models=generation.models, bundles=bundles)
        if admission.steered is None:
            raise InvalidSteering([Violation("steering", "is missing; give the field as a generation request would")])
        plan = admission.steered.plan
        return JSONResponse(
            {
                "valid": True,
                "plan": plan.hash,
                "bundles": list(admission.steered.bundles),
                "hook_points": [f"blocks.{layer}.resid_post" for layer in plan.layers],
                "n_rows": len(plan.rows),
            }
        )

    app.add_route("/v1/steering/validate", validate, methods=["POST"])

    async def schema(_: Request) -> Response:
        return JSONResponse(Steering.model_json_schema())

    app.add_route("/v1/steering/schema", schema, methods=["GET"])

    async def livez(_: Request) -> Response:
        return JSONResponse({"status": "live"})

    app.add_route("/livez", livez, methods=["GET"])

    async def readyz(_: Request) -> Response:
        if drain.begun or generation.engine.errored:
            return JSONResponse({"status": "draining" if drain.begun else "engine_dead"}, 503)
        return JSONResponse({"status": "ready"})

    app.add_route("/readyz", readyz, methods=["GET"])

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.add_route("/metrics", metrics, methods=["GET"])
    return app


def _problems(app: FastAPI) -> None:
    """Each error that can leave a route, in OpenAI's shape."""

    async def respond(request: Request, error: Exception) -> Response:
        problem = _problem(request, error)
        return JSONResponse(problem.document, problem.status, dict(problem.headers))

    # Starlette logs what only the last of these catches, after the reply.
    for kind in (TrimtabError, Refused, body.BodyTooLarge, HTTPException, Exception):
        app.add_exception_handler(kind, respond)


def _problem(request: Request, error: Exception) -> Problem:
    match error:
        case TrimtabError():
            return of_error(error)
        case Refused():
            return error.problem
        case body.BodyTooLarge():
            return Problem(413, "request_too_large", str(error))
        case HTTPException(status_code=405):
            return Problem(405, "method_not_allowed", f"{request.url.path} does not take {request.method}")
        case HTTPException():
            what = f"no route {request.url.path}"
            return Problem(404, "not_found", f"{what}; the README lists this server's routes")
        case _:
            what = f"an error of the server ({type(error).__name__})"
            return Problem(500, "internal", f"{what}; its log has the cause")
