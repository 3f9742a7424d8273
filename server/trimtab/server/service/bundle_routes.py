"""The routes of the shelf: list, show, load, pin and remove bundles, while the server runs.

GET                    /v1/steering/bundles  /v1/steering/bundles/{name}
POST                   /v1/steering/bundles?replace=true&pin=true        the bytes of a bundle's file
PUT, DELETE            /v1/steering/bundles/{name}/pin
DELETE                 /v1/steering/bundles/{name}
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.service import body
from trimtab.server.service.shelf import MAX_UPLOAD_BYTES, Shelf

__all__ = ["add_bundle_routes", "summary_of"]

_MEDIA = "application/octet-stream"
_SWITCHES = {"true": True, "false": False}


def add_bundle_routes(app: FastAPI, shelf: Shelf) -> None:
    """Serve the shelf."""

    async def list_bundles(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [summary_of(shelf, name) for name in sorted(shelf)]})

    async def show_bundle(request: Request) -> Response:
        bundle = shelf.find(request.path_params["name"])
        header = bundle.header
        extra = {"hook_point": header.hook_point, "content_hash": bundle.content_hash}
        return JSONResponse(header.model_dump(mode="json") | extra | {"pinned": shelf.is_pinned(header.name)})

    async def put_bundle(request: Request) -> Response:
        shelf.require_mutable()
        replace, pin = _switches(request, "replace", "pin")
        data = await body.read(request.stream(), request.headers, media=_MEDIA, most=MAX_UPLOAD_BYTES)
        bundle, is_new = await shelf.put(data, replace=replace, pin=pin)
        return JSONResponse(summary_of(shelf, bundle.header.name), 201 if is_new else 200)

    async def remove_bundle(request: Request) -> Response:
        shelf.require_mutable()
        bundle = await shelf.remove(request.path_params["name"])
        return JSONResponse({"name": bundle.header.name, "content_hash": bundle.content_hash, "deleted": True})

    async def pin_bundle(request: Request) -> Response:
        shelf.require_mutable()
        bundle = shelf.pin(request.path_params["name"], request.method == "PUT")
        return JSONResponse(summary_of(shelf, bundle.header.name))

    app.add_route("/v1/steering/bundles", list_bundles, methods=["GET"])
    app.add_route("/v1/steering/bundles", put_bundle, methods=["POST"])
    app.add_route("/v1/steering/bundles/{name}", show_bundle, methods=["GET"])
    app.add_route("/v1/steering/bundles/{name}", remove_bundle, methods=["DELETE"])
    app.add_route("/v1/steering/bundles/{name}/pin", pin_bundle, methods=["PUT", "DELETE"])


def _switches(request: Request, *names: str) -> list[bool]:
    violations = [
        Violation(key, "is not a parameter of this route") for key in request.query_params if key not in names
    ]
    given = {name: request.query_params.get(name, "false") for name in names}
    violations += [
        Violation(k, f"must be true or false, not {v[:20]!r}") for k, v in given.items() if v not in _SWITCHES
    ]
    if violations:
        raise InvalidRequest(violations)
    return [_SWITCHES[given[name]] for name in names]


def summary_of(shelf: Shelf, name: str) -> dict[str, Any]:
    """What a listing says of a bundle.

    Raises:
        UnknownBundle: there is none of that name.
    """
    bundle = shelf.find(name)
    header = bundle.header
    return {
        "name": name,
        "content_hash": bundle.content_hash,
        "behaviour": header.behaviour,
        "model": header.model.id,
        "hook_point": header.hook_point,
        "n_latents": len(header.latents),
        "n_vectors": len(header.vectors),
        "edits": [edit.model_dump(mode="json", exclude_none=True) for edit in header.edits],
        "pinned": shelf.is_pinned(name),
    }
