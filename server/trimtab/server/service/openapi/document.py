"""The document: every allow-listed route of HTTP with its scopes, its schemas and its errors. Pure, and the same every time."""

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from trimtab.server.keys.access import OPEN, ROUTES
from trimtab.server.service.openapi.operations import OPERATIONS, Operation
from trimtab.server.service.openapi.schemas import components, ref

__all__ = ["openapi"]

_WORDS = {
    400: "The request is wrong; each field at fault is named.",
    401: "No valid key.",
    403: "The key does not allow this.",
    404: "There is nothing of that name.",
    405: "The path takes other methods.",
    409: "What is there does not allow it.",
    410: "The bundle was revoked.",
    413: "The body is too large.",
    429: "The key's quota is used up; `Retry-After` says until when.",
    431: "The headers are too large.",
    500: "The server failed, or the reply was not steered as asked and is withheld.",
    503: "Full, draining, cut off from the database, or steering is switched off.",
}
_OF_THE_GATE = (401, 403, 405, 431, 500, 503)
_SEGMENTS: Mapping[str, dict[str, Any]] = {
    "reference": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}:v[1-9][0-9]{0,8}$"},
    "id": {"type": "string", "pattern": "^[a-z2-7]{10}$"},
    "name": {"type": "string", "minLength": 1},
    "key": {"type": "string", "minLength": 1},
    "subject": {"type": "string", "minLength": 1},
}
_ANY_BYTES = {"type": "string", "format": "binary"}
_EVENT: dict[str, Any] = {
    "type": "object",
    "description": "Each event; its data is JSON, or `[DONE]`.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


@cache
def openapi() -> dict[str, Any]:
    """The document; do not change it."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path in ROUTES:
        if method != "GRPC":
            paths.setdefault(path, {})[method.lower()] = _operation(method, path, OPERATIONS[method, path])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trimtab",
            "version": version("trimtab"),
            "description": "OpenAI's API with a `steering` field, and what goes with it. Requests and replies of OpenAI's routes "
            "are vLLM's own models. A server without keys listens on loopback alone and asks for none.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "A key of this server."}},
        },
    }


def _operation(method: str, path: str, told: Operation) -> dict[str, Any]:
    scopes = ROUTES[method, path]
    names = re.findall(r"\{(\w+)\}", path)
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": _segment(name, names),
        }
        for name in names
    ] + [
        {"name": p.name, "in": p.place, "required": False, "schema": dict(p.schema), "description": p.description}
        for p in told.parameters
    ]
    refuses = sorted({*told.refuses, *(_OF_THE_GATE if scopes != OPEN else (405, 431, 500))})
    found: dict[str, Any] = {
        "operationId": _id(method, path),
        "summary": told.summary,
        "tags": ["probes" if scopes == OPEN else "admin" if path.startswith("/admin") else "v1"],
        "parameters": parameters,
        "responses": {
            **{str(status): _answer(content, told.links) for status, content in told.answers.items()},
            **{str(status): _refusal(status) for status in refuses if status not in told.answers},
        },
    }
    if told.body is not None:
        content = {media: {"schema": _schema(name, media)} for media, name in told.body.items()}
        found["requestBody"] = {"required": told.is_body_required, "content": content}
    if scopes != OPEN:
        found["security"] = [{"key": []}]
        found["description"] = f"With keys, one of scope {' or '.join(scopes)}."
    return found


def _segment(name: str, names: list[str]) -> dict[str, Any]:
    """The schema of a part of a path, among all of its parts."""
    if name == "kind":
        return {"enum": ["key", "alias"] if "subject" in names else ["fleet"]}
    return _SEGMENTS[name]


def _answer(content: Mapping[str, str], links: Mapping[str, str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "description": "Done.",
        "headers": {"X-Request-Id": {"schema": {"type": "string"}}},
        "content": {media: {"schema": _schema(name, media)} for media, name in content.items()},
    }
    if links:
        found["links"] = {_link(target): _linked(target, field) for target, field in links.items()}
    return found


def _linked(target: str, field: str) -> dict[str, Any]:
    route, _, parameter = target.partition("#")
    method, _, path = route.partition(" ")
    return {"operationId": _id(method, path), "parameters": {parameter: f"$response.body#/{field}"}}


def _link(target: str) -> str:
    return re.sub(r"\W+", "_", target.partition("#")[0]).strip("_")


def _refusal(status: int) -> dict[str, Any]:
    return {"description": _WORDS[status], "content": {"application/json": {"schema": ref("Error")}}}


def _schema(name: str, media: str) -> dict[str, Any]:
    if name == "{steering}":
        return {
            "type": "object",
            "properties": {"steering": ref("Steering")},
            "required": ["steering"],
            "description": "The body of a generation request, or its `steering` alone.",
        }
    if name:
        parts = [ref(part) for part in name.split("|")]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}
    match media:
        case "application/json":
            return {"type": "object"}
        case "application/octet-stream":
            return _ANY_BYTES
        case "text/event-stream":
            return _EVENT
        case _:
            return {"type": "string"}


def _id(method: str, path: str) -> str:
    return f"{method.lower()}_{re.sub(r'[^A-Za-z0-9]+', '_', path).strip('_')}"
