"""The routes of administration, under /admin/v1: keys, default steering, the kill switch, the audit log.

GET, POST              keys;  POST keys/{id}/rotate  keys/{id}/revoke
GET, PUT, DELETE       defaults;  defaults/fleet, defaults/{kind}/{subject}
GET, POST, DELETE      kill
GET                    audit?after=N&limit=N

When a change is answered this replica goes by it; the others do within a second.
"""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from trimtab.server.database.database import Moment
from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.fleet.defaults import Kind
from trimtab.server.fleet.switch import Mode
from trimtab.server.keys.key import Caller, Key, Policy, parse_scopes
from trimtab.server.registry.version import Running
from trimtab.server.service.document import Body, Reason, parsed
from trimtab.server.service.replica import Replica
from trimtab.server.service.versions import Choice

__all__ = ["actor", "add_admin_routes", "number"]

_MAX_ENTRIES = 1000


class NewKey(Body):
    """A key to be made."""

    label: Annotated[str, Field(min_length=1, max_length=100)]
    scopes: Annotated[tuple[str, ...], Field(min_length=1)]
    policy: Policy = Policy()
    expires_at: Moment | None = None


class Rotation(Body):
    """What goes with the rotation of a key."""

    grace_seconds: Annotated[int, Field(ge=0, le=90 * 86400)] = 0
    """How long the old key goes on."""


class NewDefault(Body):
    """Default steering to be set."""

    steering: dict[str, Any]
    reason: Reason = ""


class Kill(Body):
    """How the kill switch is thrown."""

    mode: Mode = "unsteered"
    fallback: dict[str, Any] | None = None
    """The safe default of mode `fallback`, a `steering` field."""
    running: Running = "end"
    reason: Annotated[Reason, Field(min_length=1)]


def add_admin_routes(app: FastAPI, replica: Replica) -> None:
    """Serve them."""
    _add_keys(app, replica)
    _add_defaults(app, replica)

    async def show_switch(_: Request) -> Response:
        return JSONResponse(replica.catalogue.snapshot.switch.document)

    async def throw(request: Request) -> Response:
        kill = await parsed(request, Kill)
        options = {"reason": kill.reason, "running": kill.running, "fallback": kill.fallback}
        return JSONResponse(
            (await replica.change(replica.switch.throw, kill.mode, actor=actor(request), **options)).document
        )

    async def resume(request: Request) -> Response:
        reason = request.query_params.get("reason") or "resumed"
        switch = await replica.change(replica.switch.throw, "off", actor=actor(request), reason=reason)
        return JSONResponse(switch.document)

    app.add_route("/admin/v1/kill", show_switch, methods=["GET"])
    app.add_route("/admin/v1/kill", throw, methods=["POST"])
    app.add_route("/admin/v1/kill", resume, methods=["DELETE"])

    async def entries(request: Request) -> Response:
        after, limit = number(request, "after", 0, 2**31 - 1), number(request, "limit", _MAX_ENTRIES, _MAX_ENTRIES)
        found = await asyncio.to_thread(replica.database.entries, after=after, limit=limit)
        return JSONResponse({"object": "list", "data": [entry._asdict() for entry in found]})

    app.add_route("/admin/v1/audit", entries, methods=["GET"])


def _add_keys(app: FastAPI, replica: Replica) -> None:
    async def list_keys(_: Request) -> Response:
        found = await asyncio.to_thread(replica.keys.list)
        return JSONResponse({"object": "list", "data": [_key(key) for key in found]})

    async def create(request: Request) -> Response:
        asked = await parsed(request, NewKey)
        key, text = await replica.change(
            replica.keys.create,
            label=asked.label,
            scopes=parse_scopes(asked.scopes),
            actor=actor(request),
            policy=asked.policy,
            expires_at=asked.expires_at,
        )
        return JSONResponse(_key(key) | {"key": text}, 201)

    async def rotate(request: Request) -> Response:
        asked = await parsed(request, Rotation)
        key_id = request.path_params["id"]
        options = {"actor": actor(request), "grace_seconds": asked.grace_seconds}
        key, text = await replica.change(replica.keys.rotate, key_id, **options)
        return JSONResponse(_key(key) | {"key": text}, 201)

    async def revoke(request: Request) -> Response:
        asked = await parsed(request, Choice)
        options = {"actor": actor(request), "reason": asked.reason}
        return JSONResponse(_key(await replica.change(replica.keys.revoke, request.path_params["id"], **options)))

    app.add_route("/admin/v1/keys", list_keys, methods=["GET"])
    app.add_route("/admin/v1/keys", create, methods=["POST"])
    app.add_route("/admin/v1/keys/{id}/rotate", rotate, methods=["POST"])
    app.add_route("/admin/v1/keys/{id}/revoke", revoke, methods=["POST"])


def _add_defaults(app: FastAPI, replica: Replica) -> None:
    def subject(request: Request) -> tuple[Kind, str]:
        kind, of = request.path_params["kind"], request.path_params.get("subject", "")
        if kind not in ("fleet", "key", "alias") or (kind == "fleet") != (of == ""):
            raise InvalidRequest([Violation("kind", "is defaults/fleet, defaults/key/{id} or defaults/alias/{name}")])
        return kind, of

    async def list_defaults(_: Request) -> Response:
        found = await asyncio.to_thread(replica.defaults.list)
        return JSONResponse({"object": "list", "data": [default.document for default in found]})

    async def put(request: Request) -> Response:
        kind, of = subject(request)
        asked = await parsed(request, NewDefault)
        options = {"actor": actor(request), "reason": asked.reason}
        default = await replica.change(replica.defaults.put, kind, of, asked.steering, **options)
        return JSONResponse(default.document)

    async def remove(request: Request) -> Response:
        kind, of = subject(request)
        await replica.change(replica.defaults.remove, kind, of, actor=actor(request))
        return JSONResponse({"kind": kind, "subject": of, "deleted": True})

    app.add_route("/admin/v1/defaults", list_defaults, methods=["GET"])
    for path in ("/admin/v1/defaults/{kind}", "/admin/v1/defaults/{kind}/{subject}"):
        app.add_route(path, put, methods=["PUT"])
        app.add_route(path, remove, methods=["DELETE"])


def actor(request: Request) -> str:
    """Who asks, as the audit log has it."""
    caller: Caller = request.state.caller
    return caller.name


def number(request: Request, name: str, default: int, most: int) -> int:
    """A number of the query."""
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 10 or int(text) > most:
        raise InvalidRequest([Violation(name, f"must be a number, 0 … {most}, not {text[:20]!r}")])
    return int(text)


def _key(key: Key) -> dict[str, Any]:
    """A key as it is shown: nothing that helps to make it."""
    fields = asdict(key) | {"scopes": sorted(key.scopes), "policy": key.policy.model_dump(mode="json")}
    del fields["digest"]
    return fields
