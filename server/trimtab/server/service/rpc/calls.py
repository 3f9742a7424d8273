"""What holds of every call: its key, its id, no new work while the server drains, and errors told in full."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from contextvars import ContextVar
from types import TracebackType
from typing import Any
from uuid import uuid4

import grpc
from grpc_status import rpc_status

from trimtab.server.errors import TrimtabError
from trimtab.server.experiments.units import PREFIX
from trimtab.server.keys.key import Caller
from trimtab.server.service.gate import Gate, UnknownRoute
from trimtab.server.service.problem import Problem, Refused, of_error, of_exception
from trimtab.server.service.rpc.status import status_of

__all__ = ["Calls", "Keys"]

log = logging.getLogger("trimtab")
_METHOD = "GRPC"
_entered: ContextVar[tuple[str, Caller]] = ContextVar("trimtab_rpc")
"""The method of a call, and who calls."""
_headers: ContextVar[dict[str, str]] = ContextVar("trimtab_rpc_headers")


class Keys(grpc.aio.ServerInterceptor):
    """Refuses calls without a key that opens the method; it is metadata: `authorization: Bearer …`."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], call: grpc.HandlerCallDetails
    ) -> Any:
        """The handler of a call, or one that refuses it."""
        metadata = {name: str(value) for name, value in call.invocation_metadata or ()}
        authorization = metadata.get("authorization", "")
        _headers.set({name: value for name, value in metadata.items() if name.startswith(PREFIX)})
        try:
            _entered.set((call.method, self._gate.caller(_METHOD, call.method, authorization)))
        except UnknownRoute:
            return None  # grpc answers UNIMPLEMENTED.
        except TrimtabError as e:
            return _refusal(of_error(e))
        return await continuation(call)


def _refusal(problem: Problem) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await context.abort_with_status(rpc_status.to_status(status_of(problem)))

    return grpc.unary_unary_rpc_method_handler(refuse)


class Calls:
    """The calls of our own services."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    @property
    def is_draining(self) -> bool:
        """The server is on its way out: a call without an end has to end."""
        return self._gate.drain.begun

    def begun(self, context: Any, path: Callable[[str], str] = lambda field: field) -> "_Call":
        """A call under way; `path` tells where a field of the HTTP API is in its message."""
        return _Call(self._gate, context, path)


class _Call:
    """As a context: the id that names the call in the engine. What is raised inside ends the call with a rich status."""

    def __init__(self, gate: Gate, context: Any, path: Callable[[str], str]) -> None:
        self._gate = gate
        self._inside = ExitStack()
        self._context = context
        self._path = path

    async def __aenter__(self) -> str:
        # Ours names the request in the engine; a client's is never used, for ids that collide cross requests.
        self._id = uuid4().hex
        # At the end, and not before: a client may ask again by itself as long as nothing has come.
        self._context.set_trailing_metadata((("x-request-id", self._id),))
        try:
            self._inside.enter_context(self._gate.inside(_METHOD, *_entered.get(), self._id, _headers.get()))
        except TrimtabError as e:
            await self._abort(of_error(e))
        return self._id

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.close()
        if isinstance(error, Exception):
            problem = of_exception(error)
            if problem.code == "internal" and not isinstance(error, Refused):
                log.exception("a call failed")
            await self._abort(problem)

    async def _abort(self, problem: Problem) -> None:
        await self._context.abort_with_status(rpc_status.to_status(status_of(problem, self._path, request_id=self._id)))
