"""The routes of the registry, under /admin/v1/bundles.

GET, POST  bundles             a file's bytes are a new version; X-Bundle-Signature: its signature, base64
GET        bundles/{reference}  bundles/{reference}/file
POST       bundles/{reference}/promote  …/default  …/revoke
"""

import base64
import binascii

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.registry.store import MAX_BUNDLE_BYTES
from trimtab.server.service import body
from trimtab.server.service.document import parsed
from trimtab.server.service.versions import Choice, Promotion, Revocation, Versions

__all__ = ["add_version_routes"]

_OCTETS = "application/octet-stream"
_ROUTE = "/admin/v1/bundles"


def add_version_routes(app: FastAPI, versions: Versions) -> None:
    """Serve them."""

    async def list_versions(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": await versions.listed()})

    async def upload(request: Request) -> Response:
        signature = _signature(request)
        data = await body.read(request.stream(), request.headers, media=_OCTETS, most=MAX_BUNDLE_BYTES)
        shown, is_new = await versions.upload(data, signature)
        return JSONResponse(shown, 201 if is_new else 200)

    async def show(request: Request) -> Response:
        return JSONResponse(await versions.show(request.path_params["reference"]))

    async def download(request: Request) -> Response:
        data, digest = await versions.file(request.path_params["reference"])
        return Response(data, media_type=_OCTETS, headers={"x-content-digest": digest})

    async def promote(request: Request) -> Response:
        asked = await parsed(request, Promotion)
        return JSONResponse(await versions.promote(request.path_params["reference"], asked))

    async def set_default(request: Request) -> Response:
        asked = await parsed(request, Choice)
        return JSONResponse(await versions.set_default(request.path_params["reference"], asked))

    async def revoke(request: Request) -> Response:
        asked = await parsed(request, Revocation)
        return JSONResponse(await versions.revoke(request.path_params["reference"], asked))

    app.add_route(_ROUTE, list_versions, methods=["GET"])
    app.add_route(_ROUTE, upload, methods=["POST"])
    app.add_route(f"{_ROUTE}/{{reference}}", show, methods=["GET"])
    app.add_route(f"{_ROUTE}/{{reference}}/file", download, methods=["GET"])
    app.add_route(f"{_ROUTE}/{{reference}}/promote", promote, methods=["POST"])
    app.add_route(f"{_ROUTE}/{{reference}}/default", set_default, methods=["POST"])
    app.add_route(f"{_ROUTE}/{{reference}}/revoke", revoke, methods=["POST"])


def _signature(request: Request) -> str | None:
    given = request.headers.get("x-bundle-signature")
    if given is None:
        return None
    try:
        return base64.b64decode(given, validate=True).decode()
    except (binascii.Error, ValueError) as e:
        raise InvalidRequest([Violation("x-bundle-signature", "is not the base64 of a signature file")]) from e
