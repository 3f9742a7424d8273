"""Errors on the wire: one place that turns each into a status and OpenAI's error document.

    {"error": {"message", "type", "param", "code", "violations": [{"field", "message"}, …]}}

`code` is the stable code in lower case, as OpenAI writes its own. `violations` is there when fields are at fault.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

from trimtab.server.errors import (
    Conflict,
    Draining,
    Forbidden,
    InvalidBundle,
    InvalidRequest,
    InvalidSteering,
    Killed,
    NotApplied,
    NotFound,
    Overloaded,
    RateLimited,
    Revoked,
    TrimtabError,
    Unauthenticated,
    Unavailable,
    UnknownBundle,
    Unsupported,
)
from trimtab.server.experiments.errors import ArmFailed, ExperimentState, StaleRevision, UnknownExperiment
from trimtab.server.service.body import BodyTooLarge

__all__ = ["RETRY_AFTER_SECONDS", "Problem", "Refused", "of_error", "of_exception", "of_vllm"]

RETRY_AFTER_SECONDS = 5

_CODES = {
    503: "overloaded",
    400: "invalid_request",
    404: "model_not_found",
    413: "request_too_large",
    422: "invalid_request",
}


class Problem(NamedTuple):
    """An error as it leaves the server."""

    status: int
    code: str
    message: str
    param: str | None = None
    violations: tuple[tuple[str, str], ...] = ()
    retry_after_seconds: float = RETRY_AFTER_SECONDS
    allow: str = ""
    """The methods that the path takes, of a 405."""

    @property
    def document(self) -> dict[str, Any]:
        """The body."""
        match self.status:
            case 401:
                kind = "authentication_error"
            case 403:
                kind = "permission_error"
            case 429:
                kind = "rate_limit_error"
            case status if status < 500:
                kind = "invalid_request_error"
            case _:
                kind = "server_error"
        error: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if self.violations:
            error["violations"] = [{"field": field, "message": message} for field, message in self.violations]
        return {"error": error}

    @property
    def headers(self) -> Mapping[str, str]:
        """What tells a client whether trying again can help."""
        match self.status:
            case 503 if self.code == Killed.code.lower():
                return {"x-should-retry": "false"}
            case 429 | 503:
                seconds = self.retry_after_seconds
                return {"retry-after": str(ceil(seconds)), "retry-after-ms": str(ceil(seconds * 1000))}
            case 401:
                return {"www-authenticate": "Bearer", "x-should-retry": "false"}
            case 405:
                return {"allow": self.allow}
            case 409:  # OpenAI's SDKs ask again by themselves otherwise.
                return {"x-should-retry": "false"}
            case 500 if self.code == NotApplied.code.lower():
                return {"x-should-retry": "false"}
            case _:
                return {}


class Refused(Exception):
    """A request ends with this problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def of_exception(error: Exception) -> Problem:
    """The problem of whatever left a handler; what nobody foresaw is the server's fault, and says nothing of its insides."""
    match error:
        case TrimtabError():
            return of_error(error)
        case Refused():
            return error.problem
        case BodyTooLarge():
            return Problem(413, "request_too_large", str(error))
        case _:
            return Problem(500, "internal", f"an error of the server ({type(error).__name__}); its log has the cause")


def of_error(error: TrimtabError) -> Problem:
    """The problem of an error of our own tree."""
    violations: tuple[tuple[str, str], ...] = ()
    match error:
        case InvalidSteering() | InvalidRequest():
            status, violations = 400, tuple((v.field, v.message) for v in error.violations)
        case UnknownBundle() | NotFound() | UnknownExperiment():
            status = 404
        case Unauthenticated():
            status = 401
        case Revoked():
            status = 410
        case RateLimited():
            wait = error.retry_after_seconds
            return Problem(429, error.code.lower(), error.message, retry_after_seconds=wait)
        case Unsupported() | InvalidBundle():
            status = 400
        case Forbidden():
            status = 403
        case Conflict() | ExperimentState() | StaleRevision():
            status = 409
        case ArmFailed() | Overloaded() | Unavailable() | Draining() | Killed():
            status = 503
        case _:
            status = 500
    return Problem(status, error.code.lower(), error.message, error.field, violations)


def of_vllm(status: int, message: str, param: str | None) -> Problem:
    """The problem of an error document that vLLM's serving code returned; a 429 of its admission control is the server's 503."""
    if status == 429:
        return Problem(503, "overloaded", message, param)
    return Problem(status, _CODES.get(status, "internal" if status >= 500 else "invalid_request"), message, param)
