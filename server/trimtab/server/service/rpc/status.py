"""Errors on the wire of gRPC: the problem of the HTTP API as a `google.rpc.Status` with its details. Pure.

ErrorInfo     reason: the code in upper case; domain "trimtab"
BadRequest    each violation, with the path of its field in the message
RetryInfo     when asking again can help
"""

from collections.abc import Callable
from math import ceil

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status

from trimtab.server.service.problem import Problem

__all__ = ["DOMAIN", "code_of", "status_of"]

DOMAIN = "trimtab"
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    410: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


def code_of(problem: Problem) -> grpc.StatusCode:
    """The code of gRPC."""
    by_kind = grpc.StatusCode.INVALID_ARGUMENT if problem.status < 500 else grpc.StatusCode.INTERNAL
    return _CODES.get(problem.status, by_kind)


def status_of(
    problem: Problem, path: Callable[[str], str] = lambda field: field, *, request_id: str | None = None
) -> Status:
    """The whole status; `path` tells where a field of the HTTP API is in the message."""
    number: int = code_of(problem).value[0]
    status = Status(code=number, message=problem.message)
    named = {} if request_id is None else {"request_id": request_id}
    info = details.ErrorInfo(reason=problem.code.upper(), domain=DOMAIN, metadata=named)
    status.details.add().Pack(info)
    violations = problem.violations or (((problem.param, problem.message),) if problem.param else ())
    if violations:
        bad = details.BadRequest()
        for field, message in violations:
            bad.field_violations.add(field=path(field), description=message)
        status.details.add().Pack(bad)
    if "retry-after" in problem.headers:
        delay = Duration(seconds=ceil(problem.retry_after_seconds))
        status.details.add().Pack(details.RetryInfo(retry_delay=delay))
    return status
