"""The routes of administration, under /admin/v1: the registry, keys, default steering, the kill switch, the audit log.

GET, POST              bundles             a file's bytes are a new version; X-Bundle-Signature: its signature, base64
GET                    bundles/{reference}  bundles/{reference}/file
POST                   bundles/{reference}/promote  …/default  …/revoke
GET, POST              keys;  POST keys/{id}/rotate  keys/{id}/revoke
GET, PUT, DELETE       defaults;  defaults/fleet, defaults/{kind}/{subject}
GET, POST, DELETE      kill
GET                    audit?after=N&limit=N

When a change is answered this replica goes by it; the others do within a second.
"""

import asyncio
import base64
import binascii
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.fleet.defaults import Kind
from trimtab.server.fleet.switch import Mode
from trimtab.server.keys.key import Caller, Key, Policy, parse_scopes
from trimtab.server.registry.store import MAX_BUNDLE_BYTES
from trimtab.server.registry.version import Running, Version, split
from trimtab.server.service import body
from trimtab.server.service.replica import Replica

__all__ = ["Body", "Reason", "actor", "add_admin_routes", "number", "parsed"]

_OCTETS = "application/octet-stream"
_MAX_ENTRIES = 1000
Reason = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")]


class Body(BaseModel):
    """The JSON of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Promotion(Body):
    """What goes with a promotion."""

    reason: Reason = ""
    default: bool = False
    """Make it what the name alone means, too."""


class Choice(Body):
    """What goes with a new default, and with a rotation or revocation of a key."""

    reason: Reason = ""


class Revocation(Body):
    """What goes with the revocation of a version."""

    reason: Annotated[Reason, Field(min_length=1)]
    running: Running = "end"


class NewKey(Body):
    """A key to be made."""

    label: Annotated[str, Field(min_length=1, max_length=100)]
    scopes: Annotated[tuple[str, ...], Field(min_length=1)]
    policy: Policy = Policy()
    expires_at: AwareDatetime | None = None


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


Parsed = TypeVar("Parsed", bound=Body)


def add_admin_routes(app: FastAPI, replica: Replica) -> None:
    """Serve them."""
    _add_bundles(app, replica)
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


def _add_bundles(app: FastAPI, replica: Replica) -> None:
    registry = replica.registry

    def shown(version: Version) -> dict[str, Any]:
        fields = asdict(version) | {"reference": version.reference, "signed": version.signature is not None}
        del fields["signature"]
        return fields | {"not_loaded": replica.not_loaded.get(version.reference)}

    async def list_versions(_: Request) -> Response:
        found = await asyncio.to_thread(registry.list)
        return JSONResponse({"object": "list", "data": [shown(version) for version in found]})

    async def upload(request: Request) -> Response:
        signature = _signature(request)
        data = await body.read(request.stream(), request.headers, media=_OCTETS, most=MAX_BUNDLE_BYTES)
        version, is_new = await replica.change(registry.upload, data, actor=actor(request), signature=signature)
        return JSONResponse(shown(version), 201 if is_new else 200)

    async def show(request: Request) -> Response:
        return JSONResponse(shown(await asyncio.to_thread(registry.find, *_reference(request))))

    async def download(request: Request) -> Response:
        version = await asyncio.to_thread(registry.find, *_reference(request))
        data = await asyncio.to_thread(registry.data, version)
        return Response(data, media_type=_OCTETS, headers={"x-content-digest": version.file_digest})

    async def promote(request: Request) -> Response:
        asked = await parsed(request, Promotion)
        options = {"actor": actor(request), "reason": asked.reason, "default": asked.default}
        return JSONResponse(shown(await replica.change(registry.promote, *_reference(request), **options)))

    async def set_default(request: Request) -> Response:
        options = {"actor": actor(request), "reason": (await parsed(request, Choice)).reason}
        return JSONResponse(shown(await replica.change(registry.set_default, *_reference(request), **options)))

    async def revoke(request: Request) -> Response:
        asked = await parsed(request, Revocation)
        options = {"actor": actor(request), "reason": asked.reason, "running": asked.running}
        return JSONResponse(shown(await replica.change(registry.revoke, *_reference(request), **options)))

    app.add_route("/admin/v1/bundles", list_versions, methods=["GET"])
    app.add_route("/admin/v1/bundles", upload, methods=["POST"])
    app.add_route("/admin/v1/bundles/{reference}", show, methods=["GET"])
    app.add_route("/admin/v1/bundles/{reference}/file", download, methods=["GET"])
    app.add_route("/admin/v1/bundles/{reference}/promote", promote, methods=["POST"])
    app.add_route("/admin/v1/bundles/{reference}/default", set_default, methods=["POST"])
    app.add_route("/admin/v1/bundles/{reference}/revoke", revoke, methods=["POST"])


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


def _reference(request: Request) -> tuple[str, int]:
    return split(request.path_params["reference"])


async def parsed(request: Request, kind: type[Parsed]) -> Parsed:
    """The body as `kind`; no body at all is an empty one."""
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    document = body.decode(await body.read(request.stream(), request.headers)) if has_body else {}
    try:
        return kind.model_validate(document)
    except ValidationError as e:
        raise InvalidRequest(
            [
                Violation(".".join(map(str, error["loc"])) or "body", error["msg"])
                for error in e.errors(include_url=False, include_input=False, include_context=False)
            ]
        ) from e


def _signature(request: Request) -> str | None:
    given = request.headers.get("x-bundle-signature")
    if given is None:
        return None
    try:
        return base64.b64decode(given, validate=True).decode()
    except (binascii.Error, ValueError) as e:
        raise InvalidRequest([Violation("x-bundle-signature", "is not the base64 of a signature file")]) from e


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
