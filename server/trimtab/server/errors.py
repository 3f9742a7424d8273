"""Every error a caller can cause, with a stable, transport-free code; HTTP maps the codes in `service`, once.

TrimtabError
├── InvalidRequest      another part of the request breaks the contract; carries every violation with the path of its field
├── InvalidSteering     the `steering` field does; likewise
├── UnknownBundle       a bundle, latent or vector that is not loaded
├── InvalidBundle       uploaded bytes that are no bundle for this server's model
├── Forbidden           this server was not started to allow it
├── Unauthenticated     no key, or none that is valid
├── Conflict            a name that is taken, a bundle that is pinned, a state that does not allow it
├── NotFound            no such key, default or alias
├── RateLimited         the caller's own quota is used up
├── Draining            the server is shutting down
├── Overloaded          the server is full; ask again later
├── Unavailable         the database does not answer, or its last answer is too old to go by
├── Killed              the kill switch ended or refused it
├── Revoked             it ran on a bundle that was revoked meanwhile
├── Tampered            the audit log, a stored bundle or a signature is not what was written
├── Unsupported         this server cannot do it (model, engine flag, vLLM release); says what can
└── NotApplied          the engine ran, but the proof does not match the plan: never shown as a normal reply

Those of experiments are in `experiments/errors.py`.
"""

from dataclasses import dataclass

__all__ = [
    "Conflict",
    "Draining",
    "Forbidden",
    "InvalidBundle",
    "InvalidRequest",
    "InvalidSteering",
    "Killed",
    "NotApplied",
    "NotFound",
    "Overloaded",
    "RateLimited",
    "Revoked",
    "Tampered",
    "TrimtabError",
    "Unauthenticated",
    "Unavailable",
    "UnknownBundle",
    "Unsupported",
    "Violation",
]


@dataclass(frozen=True)
class Violation:
    """One thing wrong with one field."""

    field: str
    """Path inside the request, `steering.edits[0].latent`."""
    message: str
    """What was wrong, the value, the allowed range, the next step."""


class TrimtabError(Exception):
    """Base of the tree; `code` is stable, the message is for people."""

    code = "INTERNAL"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequest(TrimtabError):
    """The request cannot be served as asked, `steering` apart; nothing was run."""

    code = "INVALID_REQUEST"

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.message}" for v in violations), field=violations[0].field)
        self.violations = violations


class InvalidSteering(TrimtabError):
    """The request's `steering` cannot be served as asked; nothing was run."""

    code = "INVALID_STEERING"

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.message}" for v in violations), field=violations[0].field)
        self.violations = violations


class UnknownBundle(TrimtabError):
    """The bundle is not loaded in this server."""

    code = "UNKNOWN_BUNDLE"


class Unauthenticated(TrimtabError):
    """No key came with the request, or none that is valid."""

    code = "INVALID_API_KEY"


class Forbidden(TrimtabError):
    """The key does not allow this, or the server was not started to."""

    code = "FORBIDDEN"


class Conflict(TrimtabError):
    """What is asked for contradicts what is there: a name that is taken, a bundle that is pinned."""

    code = "CONFLICT"


class NotFound(TrimtabError):
    """There is nothing of that name."""

    code = "NOT_FOUND"


class InvalidBundle(TrimtabError):
    """The uploaded bytes are no bundle for this server."""

    code = "INVALID_BUNDLE"


class Overloaded(TrimtabError):
    """The server is full; ask again later."""

    code = "OVERLOADED"


class RateLimited(TrimtabError):
    """The caller's own quota is used up for now."""

    code = "RATE_LIMITED"

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Draining(TrimtabError):
    """The server takes on no new work; ask another replica."""

    code = "DRAINING"


class Unavailable(TrimtabError):
    """The database does not answer, or its last answer is too old to go by; ask again later."""

    code = "UNAVAILABLE"


class Killed(TrimtabError):
    """The operator has switched steering off."""

    code = "STEERING_KILLED"


class Revoked(TrimtabError):
    """The bundle was revoked."""

    code = "BUNDLE_REVOKED"


class Tampered(TrimtabError):
    """Something stored is not what was written."""

    code = "TAMPERED"


class Unsupported(TrimtabError):
    """This server, model or vLLM release cannot do what was asked."""

    code = "UNSUPPORTED"


class NotApplied(TrimtabError):
    """What the engine applied is not what the plan asked for; the reply is withheld."""

    code = "STEERING_NOT_APPLIED"
