"""What holds of every call: its key, its id, no new work while the server drains, errors told in full, one record in the log."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import grpc
from grpc_status import rpc_status

from trimtab.server.errors import TrimtabError
from trimtab.server.experiments.units import PREFIX
from trimtab.server.keys.key import Caller
from trimtab.server.operations.tracing import call_span
from trimtab.server.service.gate import Gate, UnknownRoute
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.openai_routes import CLOSED_BY_CLIENT
from trimtab.server.service.problem import Problem, Refused, of_error, of_exception
from trimtab.server.service.rpc.decoding import typed
from trimtab.server.service.rpc.status import status_of
from trimtab.server.service.served import Served

__all__ = ["Call", "Calls", "Keys"]

log = logging.getLogger("trimtab")
_METHOD = "GRPC"
_NO_MESSAGE = Problem(
    400, "invalid_request", "the bytes are no message of this method; proto/trimtab/v1 has the contract"
)
_entered: ContextVar[tuple[str, Caller]] = ContextVar("trimtab_rpc")
"""The method of a call, and who calls."""
_headers: ContextVar[dict[str, str]] = ContextVar("trimtab_rpc_headers")


class Keys(grpc.aio.ServerInterceptor):
    """Refuses calls without a key that opens the method; it is metadata: `authorization: Bearer …`."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

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
            self._metrics.rejected.labels("not_found").inc()
            return None  # grpc answers UNIMPLEMENTED.
        except TrimtabError as e:
            return self._refusal(call.method, of_error(e))
        handler = await continuation(call)
        return handler and typed(handler, lambda context: self._refuse(call.method, _NO_MESSAGE, context))

    def _refusal(self, method: str, problem: Problem) -> Any:
        async def refuse(_: Any, context: Any) -> None:
            await self._refuse(method, problem, context)

        # Of all kinds of handlers the one that reads no message before it answers.
        return grpc.stream_unary_rpc_method_handler(refuse)

    async def _refuse(self, method: str, problem: Problem, context: Any) -> None:
        served, request_id = Served(_METHOD, method), uuid4().hex
        served.status = problem.status
        self._metrics.rejected.labels(problem.code).inc()
        served.finish(self._metrics, request_id)
        await context.abort_with_status(rpc_status.to_status(status_of(problem, request_id=request_id)))


class Calls:
    """The calls of our own services."""

    def __init__(self, gate: Gate, metrics: Metrics, spans: Any = None) -> None:
        """`spans` is OpenTelemetry's tracer provider, or None."""
        self._gate = gate
        self._metrics = metrics
        self._spans = spans

    @property
    def is_draining(self) -> bool:
        """The server is on its way out: a call without an end has to end."""
        return self._gate.drain.begun

    def begun(self, context: Any, path: Callable[[str], str] = lambda field: field) -> "Call":
        """A call under way; `path` tells where a field of the HTTP API is in its message."""
        return Call(self._gate, self._metrics, self._spans, context, path)


class Call:
    """As a context: the call. What is raised inside ends it with a rich status; its end is one record of the log."""

    def __init__(self, gate: Gate, metrics: Metrics, spans: Any, context: Any, path: Callable[[str], str]) -> None:
        self._gate = gate
        self._metrics = metrics
        self._inside = ExitStack()
        self._context = context
        self._path = path
        method, self._caller = _entered.get()
        self._method = method
        self._served = Served(_METHOD, method)
        self._served.caller = self._caller.name
        # Ours names the request in the engine; a client's is never used, for ids that collide cross requests.
        self.id = uuid4().hex
        self._span = None if spans is None else call_span(spans, method, context.invocation_metadata() or ())

    def told(self, steering: Mapping[str, Any]) -> None:
        """The reply's `steering`, as it is known when the reply begins."""
        told = {"steering": steering["status"], "plan": steering.get("plan")}
        if (experiment := steering.get("experiment")) is not None:
            told["experiment"] = f"{experiment['key']}={experiment['arm']}"
        self._served.told = {name: value for name, value in told.items() if value is not None}

    async def __aenter__(self) -> Self:
        # At the end, and not before: a client may ask again by itself as long as nothing has come.
        self._context.set_trailing_metadata((("x-request-id", self.id),))
        try:
            inside = self._gate.inside(_METHOD, self._method, self._caller, self.id, _headers.get())
            self._inside.enter_context(inside)
        except TrimtabError as e:
            problem = of_error(e)
            self._metrics.rejected.labels(problem.code).inc()
            await self._abort(problem)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.close()
        if isinstance(error, grpc.aio.AbortError):  # What cannot be decoded is answered, and written down.
            if self._span is not None:
                self._span.end({"status": _NO_MESSAGE.status, "request_id": self.id})
            return
        if error is None or not isinstance(error, Exception):
            self._finish(200 if error is None else CLOSED_BY_CLIENT)
        else:
            problem = of_exception(error)
            if problem.code == "internal" and not isinstance(error, Refused):
                log.exception("a call failed")
            await self._abort(problem)

    def _finish(self, status: int) -> None:
        served = self._served
        served.status = status
        served.finish(self._metrics, self.id)
        if self._span is not None:
            told = {
                "caller": served.caller,
                "status": status,
                "request_id": self.id,
                "experiment": served.told.get("experiment"),
            }
            steering = {"steering.status": served.told.get("steering"), "steering.plan": served.told.get("plan")}
            self._span.end({**told, **steering})

    async def _abort(self, problem: Problem) -> None:
        self._finish(problem.status)
        await self._context.abort_with_status(rpc_status.to_status(status_of(problem, self._path, request_id=self.id)))
