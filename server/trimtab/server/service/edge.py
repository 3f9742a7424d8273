"""The outermost layer of the app, around every route: the API key, request ids, and no new work while the server drains."""

import hashlib
import hmac
import re
from uuid import uuid4

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.server.service.problem import Problem

__all__ = ["DRAINING", "Drain", "Edge", "digest", "key_problem"]

DRAINING = Problem(503, "draining", "this server is shutting down; ask another replica")


_OPEN = frozenset({"/livez", "/readyz"})
"""Probes carry no key."""

_WORK = frozenset({"POST", "PUT", "DELETE"})

_ECHOED = re.compile(r"[\x21-\x7e]{1,128}")


class Drain:
    """A server on its way out: it refuses new work, says that it is not ready, and waits for what it has taken on."""

    def __init__(self) -> None:
        self.begun = False
        self.n_active = 0
        """Requests other than GET that are being served."""


def digest(key: str) -> bytes:
    """What is kept and compared in place of a key."""
    return hashlib.sha256(key.encode()).digest()


def key_problem(key: bytes | None, authorization: str) -> Problem | None:
    """Why this `Authorization` does not open a server whose key has the digest `key`; None when it does, or there is no key."""
    scheme, _, given = authorization.partition(" ")
    if key is None or (scheme.lower() == "bearer" and hmac.compare_digest(digest(given.strip()), key)):
        return None
    return Problem(401, "invalid_api_key", "give this server's key: `Authorization: Bearer …`", "authorization")


class Edge:
    """ASGI middleware; `key` is the digest of the API key, None for a server without one."""

    def __init__(self, app: ASGIApp, *, key: bytes | None, drain: Drain) -> None:
        self._app = app
        self._key = key
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # Ours names the request in the engine; a client's is only echoed, for ids that collide cross requests.
        ours = uuid4().hex
        given = headers.get(b"x-request-id", "")
        scope.setdefault("state", {})["request_id"] = ours
        echoed = given if _ECHOED.fullmatch(given) else ours

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", echoed.encode())]
            await send(message)

        problem = self._problem(scope, headers)
        if problem is not None:
            await JSONResponse(problem.document, problem.status, problem.headers)(scope, receive, named)
            return
        is_work = scope["method"] in _WORK
        self._drain.n_active += is_work
        try:
            await self._app(scope, receive, named)
        finally:
            self._drain.n_active -= is_work

    def _problem(self, scope: Scope, headers: dict[bytes, str]) -> Problem | None:
        refused = scope["path"] not in _OPEN and key_problem(self._key, headers.get(b"authorization", ""))
        if refused:
            return refused
        return DRAINING if self._drain.begun and scope["method"] in _WORK else None
