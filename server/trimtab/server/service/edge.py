"""The outermost layer of the HTTP app, around every route: bounded headers, request ids, and the gate."""

import re
from uuid import uuid4

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.server.errors import TrimtabError
from trimtab.server.keys.access import methods_of
from trimtab.server.service.gate import Gate, UnknownRoute
from trimtab.server.service.problem import Problem, of_error

__all__ = ["MAX_HEADERS", "MAX_HEADER_BYTES", "Edge", "unknown_route"]

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
_ECHOED = re.compile(r"[\x21-\x7e]{1,128}")


class Edge:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        # Ours names the request in the engine; a client's is only echoed, for ids that collide cross requests.
        ours = uuid4().hex
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = ours
        echoed = given if _ECHOED.fullmatch(given) else ours
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", echoed.encode())]
            await send(message)

        method, path = scope["method"], scope["path"]
        try:
            _bounded(scope)
            caller = self._gate.caller(method, path, headers.get(b"authorization", ""))
            state["caller"] = caller
            with self._gate.inside(method, path, caller, ours):
                await self._app(scope, receive, named)
                return
        except UnknownRoute:
            problem = unknown_route(method, path)
        except _TooLarge as e:
            problem = Problem(431, "headers_too_large", str(e))
        except TrimtabError as e:
            if started:
                raise
            problem = of_error(e)
        await JSONResponse(problem.document, problem.status, dict(problem.headers))(scope, receive, named)


class _TooLarge(Exception):
    pass


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
        return Problem(405, "method_not_allowed", f"{path} takes {', '.join(methods_of(path))}, not {method}")
    return Problem(404, "not_found", f"no route {path}; the README lists this server's routes")
