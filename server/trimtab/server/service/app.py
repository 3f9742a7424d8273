"""The app: an allow-list of routes, and nothing of vLLM's own app.

GET  /livez  /readyz  /startupz  /metrics  /openapi.json
and those of OpenAI, of steering, of the bundles, and of administration, each in its file
"""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

from trimtab.server.errors import TrimtabError
from trimtab.server.service import body
from trimtab.server.service.admin_routes import add_admin_routes
from trimtab.server.service.bundle_routes import add_bundle_routes
from trimtab.server.service.edge import Edge, unknown_route
from trimtab.server.service.experiment_routes import add_experiment_routes
from trimtab.server.service.gate import Gate
from trimtab.server.service.generation import Generation
from trimtab.server.service.inspect import Inspector
from trimtab.server.service.openai_routes import add_openai_routes
from trimtab.server.service.openapi.document import openapi
from trimtab.server.service.problem import Problem, Refused, of_exception
from trimtab.server.service.replica import Replica
from trimtab.server.service.shelf import Shelf
from trimtab.server.service.steering_routes import add_steering_routes
from trimtab.server.service.version_routes import add_version_routes
from trimtab.server.service.versions import Versions

__all__ = ["build"]


def build(
    generation: Generation,
    shelf: Shelf,
    models: OpenAIServingModels,
    tokenization: ServingTokenization,
    registry: CollectorRegistry,
    replica: Replica,
    gate: Gate,
) -> FastAPI:
    """The app over a running engine."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Edge, gate=gate, metrics=generation.metrics)
    _problems(app)

    add_openai_routes(app, generation, models, tokenization)
    add_bundle_routes(app, shelf)
    add_version_routes(app, Versions(replica))
    add_admin_routes(app, replica)
    add_experiment_routes(app, replica)

    add_steering_routes(app, generation, Inspector(generation, tokenization))

    async def livez(_: Request) -> Response:
        return JSONResponse({"status": "live"})

    # The port is not listened on before the engine is proven, so whoever is answered is told that the start is over.
    for path in ("/livez", "/startupz"):
        app.add_route(path, livez, methods=["GET"])

    async def readyz(_: Request) -> Response:
        status = "draining" if gate.drain.begun else "engine_dead" if generation.engine.errored else "ready"
        if status == "ready" and replica.follower.is_stale:
            status = "stale"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    app.add_route("/readyz", readyz, methods=["GET"])

    async def show_openapi(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(openapi))

    app.add_route("/openapi.json", show_openapi, methods=["GET"])

    metrics = generation.metrics

    async def show_metrics(_: Request) -> Response:
        metrics.running.set(replica.limits.n_running)
        metrics.killed.set(replica.catalogue.snapshot.switch.mode != "off")
        metrics.database_silence.set(replica.follower.silence_seconds)
        metrics.sequence.set(replica.catalogue.snapshot.sequence)
        metrics.not_loaded.set(len(replica.not_loaded))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.add_route("/metrics", show_metrics, methods=["GET"])
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
        case HTTPException():
            return unknown_route(request.method, request.url.path)
        case _:
            return of_exception(error)
