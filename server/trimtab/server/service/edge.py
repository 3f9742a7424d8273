"""The outermost layer of the HTTP app, around every route: bounded headers, request ids, and the gate."""

import re
from collections.abc import Mapping
from contextlib import suppress
from uuid import uuid4

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.server.errors import Forbidden, TrimtabError
from trimtab.server.experiments.units import PREFIX
from trimtab.server.keys.access import methods_of, route_of
from trimtab.server.keys.key import ANONYMOUS, Caller
from trimtab.server.service.gate import Gate, UnknownRoute
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.problem import Problem, of_error
from trimtab.server.service.served import Served

__all__ = ["MAX_HEADERS", "MAX_HEADER_BYTES", "Edge", "unknown_route"]

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
_TOLD = {b"x-steering-status": "steering", b"x-steering-plan": "plan", b"x-trimtab-experiment": "experiment"}
_PREFIX = PREFIX.encode()
_LOOPBACK = re.compile(r"https?://(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")
_ECHOED = re.compile(r"[\x21-\x7e]{1,128}")


class Edge:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, gate: Gate, metrics: Metrics) -> None:
        self._app = app
        self._gate = gate
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        # Ours names the request in the engine; a client's is only echoed, for ids that collide cross requests.
        ours = uuid4().hex
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        scope.setdefault("state", {})["request_id"] = ours
        echoed = given if _ECHOED.fullmatch(given) else ours
        served = Served(scope["method"], route_of(scope["method"], scope["path"]) or "none")

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note(served, message)
                message["headers"] = [*message["headers"], (b"x-request-id", echoed.encode())]
            await send(message)

        try:
            problem = await self._serve(scope, receive, named, headers, served, ours)
            if problem is not None:
                self._metrics.rejected.labels(problem.code).inc()
                await JSONResponse(problem.document, problem.status, dict(problem.headers))(scope, receive, named)
        finally:
            served.finish(self._metrics, ours)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, str], served: Served, request_id: str
    ) -> Problem | None:
        """Why the request was turned away at the gate; None if it was let in, and served."""
        method, path = scope["method"], scope["path"]
        try:
            _bounded(scope)
            caller = self._gate.caller(method, path, headers.get(b"authorization", ""))
            served.caller = caller.name
            _from_here(caller, headers.get(b"origin"))
            scope["state"]["caller"] = caller
            with self._gate.inside(method, path, caller, request_id, _told(headers)):
                await self._app(scope, receive, send)
        except ClientDisconnect:
            return None  # before its body was read: nobody to answer, and nothing wrong here
        except UnknownRoute:
            return unknown_route(method, path)
        except _TooLarge as e:
            return Problem(431, "headers_too_large", str(e))
        except TrimtabError as e:
            if served.status:
                raise
            return of_error(e)
        return None


def _note(served: Served, start: Message) -> None:
    served.status = start["status"]
    served.told = {_TOLD[name]: value.decode() for name, value in start["headers"] if name in _TOLD}


def _told(headers: Mapping[bytes, str]) -> dict[str, str]:
    """The headers that tell of a request's units, read as UTF-8 where they are."""
    found = {name.decode(): value for name, value in headers.items() if name.startswith(_PREFIX)}
    for name, value in found.items():
        with suppress(UnicodeDecodeError):
            found[name] = value.encode("latin-1").decode()
    return found


class _TooLarge(Exception):
    pass


def _from_here(caller: Caller, origin: str | None) -> None:
    """Nothing, unless a web page of elsewhere asks in the name of whoever looks at it, at a server that asks for no key.

    Raises:
        Forbidden: it does.
    """
    if origin is None or caller.name != ANONYMOUS.name or not caller.scopes:
        return
    if not _LOOPBACK.fullmatch(origin):
        raise Forbidden(f"a page of {origin[:80]} may not call a server without keys; `trimtab keys create` makes one")


def _bounded(scope: Scope) -> None:
    headers = scope["headers"]
    n_bytes = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path") or b"")
    n_bytes += len(scope["query_string"])
    if len(headers) > MAX_HEADERS or n_bytes > MAX_HEADER_BYTES:
        raise _TooLarge(
            f"the request has {len(headers)} headers, {n_bytes} bytes with its URL; this server reads {MAX_HEADERS} and "
            f"{MAX_HEADER_BYTES}"
        )


def unknown_route(method: str, path: str) -> Problem:
    """The problem of a route that is not served."""
    if methods_of(path):
        allowed = ", ".join(methods_of(path))
        return Problem(405, "method_not_allowed", f"{path} takes {allowed}, not {method}", allow=allowed)
    return Problem(404, "not_found", f"no route {path}; the README lists this server's routes")
