"""The routes of experiments; docs/experiments.md has the shapes of their JSON.

GET, POST   /admin/v1/experiments
GET, PUT    /admin/v1/experiments/{key}              PUT edits a draft
POST        …/start  …/ramp  …/approve  …/pause  …/resume  …/stop  …/kill  …/archive  …/purge
GET         …/health  …/results  …/looks?count=N
GET         …/exposures?after=ID&limit=N  …/outcomes?after=SUBJECT&limit=N       NDJSON, in pages
GET         …/texts?after=ID&limit=N                                             likewise; audited
GET, PUT    /admin/v1/holdout
POST        /v1/outcomes

When a change is answered this replica goes by it; the others do within a second.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from trimtab.server.database.database import utc_now
from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.experiments import documents
from trimtab.server.experiments.lifecycle import Action, Record, State
from trimtab.server.experiments.looks import MAX_LOOKS, looks
from trimtab.server.experiments.outcomes import parse_outcomes
from trimtab.server.service.admin_routes import actor, number
from trimtab.server.service.document import Body, Reason, parsed
from trimtab.server.service.enrolment import plans_of
from trimtab.server.service.replica import Replica

__all__ = ["add_experiment_routes", "health", "purged", "results", "started"]

_NDJSON = "application/x-ndjson"
_PAGE = 10_000
_TEXTS = 1_000
_LOOKS = 30
_PATH = "/admin/v1/experiments"


class NewExperiment(Body):
    """A definition to write down, or to put in the place of a draft's."""

    definition: dict[str, Any]
    reason: Reason
    revision: int | None = None


class Move(Body):
    """What goes with a change of state."""

    reason: Reason
    revision: int | None = None


class Ramp(Move):
    """What goes with a ramp by hand."""

    coverage: float


class Share(Body):
    """The global holdout."""

    share: float
    reason: Reason


class Told(Body):
    """What became of replies."""

    outcomes: list[Any]


def add_experiment_routes(app: FastAPI, replica: Replica) -> None:
    """Serve them."""
    _add_reading(app, replica)
    experiments = replica.experiments

    async def create(request: Request) -> Response:
        asked = await parsed(request, NewExperiment)
        record = await replica.change(experiments.create, asked.definition, actor=actor(request), reason=asked.reason)
        return JSONResponse(documents.experiment(record), 201)

    async def edit(request: Request) -> Response:
        asked = await parsed(request, NewExperiment)
        options = {"actor": actor(request), "reason": asked.reason, "revision": asked.revision}
        record = await replica.change(experiments.edit, request.path_params["key"], asked.definition, **options)
        return JSONResponse(documents.experiment(record))

    def does(change: Callable[..., Awaitable[Record]]) -> Callable[[Request], Any]:
        async def move(request: Request) -> Response:
            asked = await parsed(request, Move)
            options = {"actor": actor(request), "reason": asked.reason, "revision": asked.revision}
            return JSONResponse(documents.experiment(await change(replica, request.path_params["key"], **options)))

        return move

    def moves(action: Action) -> Callable[[Request], Any]:
        async def move(request: Request) -> Response:
            asked = await parsed(request, Ramp if action == "ramp" else Move)
            options: dict[str, Any] = {"actor": actor(request), "reason": asked.reason, "revision": asked.revision}
            if isinstance(asked, Ramp):
                options["coverage"] = asked.coverage
            record = await replica.change(experiments.change, request.path_params["key"], action, **options)
            return JSONResponse(documents.experiment(record))

        return move

    app.add_route(_PATH, create, methods=["POST"])
    app.add_route(f"{_PATH}/{{key}}", edit, methods=["PUT"])
    app.add_route(f"{_PATH}/{{key}}/start", does(started), methods=["POST"])
    app.add_route(f"{_PATH}/{{key}}/purge", does(purged), methods=["POST"])
    actions: tuple[Action, ...] = ("ramp", "approve", "pause", "resume", "stop", "kill", "archive")
    for action in actions:
        app.add_route(f"{_PATH}/{{key}}/{action}", moves(action), methods=["POST"])

    async def hold_out(request: Request) -> Response:
        asked = await parsed(request, Share)
        share = await replica.change(experiments.hold_out, asked.share, actor=actor(request), reason=asked.reason)
        return JSONResponse({"share": share})

    async def show_holdout(_: Request) -> Response:
        return JSONResponse({"share": replica.catalogue.snapshot.holdout})

    app.add_route("/admin/v1/holdout", show_holdout, methods=["GET"])
    app.add_route("/admin/v1/holdout", hold_out, methods=["PUT"])

    async def tell(request: Request) -> Response:
        asked = await parsed(request, Told)
        outcomes = parse_outcomes(asked.outcomes, replica.digest, now=utc_now())
        return JSONResponse(await asyncio.to_thread(replica.outcomes.record, outcomes))

    app.add_route("/v1/outcomes", tell, methods=["POST"])


def _add_reading(app: FastAPI, replica: Replica) -> None:
    experiments, measurements = replica.experiments, replica.measurements

    async def list_all(request: Request) -> Response:
        asked = request.query_params.get("state")
        state = next((state for state in get_args(State) if state == asked), None)
        if asked is not None and state is None:
            raise InvalidRequest([Violation("state", f"is one of {', '.join(get_args(State))}, not {asked[:20]!r}")])
        found = await asyncio.to_thread(experiments.list, state=state)
        return JSONResponse({"object": "list", "data": [documents.experiment(record) for record in found]})

    async def show(request: Request) -> Response:
        key = request.path_params["key"]
        record = await asyncio.to_thread(experiments.find, key)
        history = await asyncio.to_thread(experiments.history, key)
        return JSONResponse(documents.experiment(record) | {"history": list(history)})

    async def show_health(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(health, replica, request.path_params["key"], utc_now()))

    async def show_results(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(results, replica, request.path_params["key"], utc_now()))

    async def show_looks(request: Request) -> Response:
        count = max(1, number(request, "count", _LOOKS, MAX_LOOKS))
        return JSONResponse(await asyncio.to_thread(_looks, replica, request.path_params["key"], count))

    def exports(rows: Callable[..., list[dict[str, Any]]], cursor: str) -> Callable[[Request], Any]:
        async def export(request: Request) -> Response:
            key, after = request.path_params["key"], _after(request)
            limit = max(1, number(request, "limit", _PAGE, _PAGE))
            await asyncio.to_thread(experiments.measured, key)
            return _page(await asyncio.to_thread(rows, key, after=after, limit=limit), cursor, limit)

        return export

    async def show_texts(request: Request) -> Response:
        key, after = request.path_params["key"], _after(request)
        limit = max(1, number(request, "limit", _TEXTS, _TEXTS))
        await asyncio.to_thread(experiments.measured, key)
        options = {"after": after, "limit": limit, "actor": actor(request)}
        page = _page(await replica.change(replica.texts.read, key, **options), "response_id", limit)
        page.headers["cache-control"] = "no-store"
        return page

    app.add_route(_PATH, list_all, methods=["GET"])
    app.add_route(f"{_PATH}/{{key}}", show, methods=["GET"])
    app.add_route(f"{_PATH}/{{key}}/health", show_health, methods=["GET"])
    app.add_route(f"{_PATH}/{{key}}/results", show_results, methods=["GET"])
    app.add_route(f"{_PATH}/{{key}}/looks", show_looks, methods=["GET"])
    app.add_route(f"{_PATH}/{{key}}/exposures", exports(measurements.exposures, "response_id"), methods=["GET"])
    app.add_route(f"{_PATH}/{{key}}/outcomes", exports(measurements.outcomes, "subject"), methods=["GET"])
    app.add_route(f"{_PATH}/{{key}}/texts", show_texts, methods=["GET"])


def _after(request: Request) -> str:
    """Where a page begins."""
    after = request.query_params.get("after", "")
    if len(after) > 64 or "\0" in after:
        raise InvalidRequest([Violation("after", "is the `x-next-after` of the page before")])
    return after


def _page(rows: list[dict[str, Any]], cursor: str, limit: int) -> Response:
    """Rows as NDJSON, with where the next page begins; a row's `cursor` may be that of several."""
    headers = {"x-next-after": rows[-1][cursor]} if len({row[cursor] for row in rows}) >= limit else {}
    lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    return Response(lines, media_type=_NDJSON, headers=headers)


async def started(replica: Replica, key: str, **options: Any) -> Record:
    """The experiment, started, with the plans that its arms compile to here and now.

    Raises:
        InvalidExperiment: an arm cannot be had, or names a bundle whose meaning may change.
    """
    definition = (await asyncio.to_thread(replica.experiments.find, key)).definition
    plans = plans_of(definition, replica.catalogue, replica.graders.named, can_ask=replica.assigner is not None)
    return await replica.change(replica.experiments.change, key, "start", plans=plans, **options)


async def purged(replica: Replica, key: str, **options: Any) -> Record:
    """The experiment, purged; its measurements are deleted when this returns.

    Raises:
        ExperimentState: it is not archived.
    """
    record = await replica.change(replica.experiments.change, key, "purge", **options)
    await asyncio.to_thread(replica.retention.delete, key)
    return record


def health(replica: Replica, key: str, now: datetime) -> dict[str, Any]:
    """The health of an experiment; blocks."""
    record = replica.experiments.measured(key)
    measured = replica.measurements.read(record)
    found = documents.results_of(record, measured, now)
    exposures = replica.exposures
    return documents.health(record, found, measured, waiting=exposures.n_waiting, failure=exposures.failure, now=now)


def results(replica: Replica, key: str, now: datetime) -> dict[str, Any]:
    """The results of an experiment; blocks."""
    record = replica.experiments.measured(key)
    measured = replica.measurements.read(record)
    return documents.results(record, documents.results_of(record, measured, now), measured)


def _looks(replica: Replica, key: str, count: int) -> dict[str, Any]:
    """The primary metric as units came in; blocks."""
    record = replica.experiments.measured(key)
    measured = replica.measurements.read(record)
    return documents.looks(record, looks(record.definition, measured.units, measured.enrolled_at, count))
