"""What can go wrong with steering, typed. Connections, keys, quotas and time-outs stay the `openai` SDK's own exceptions.

TrimtabError
├── InvalidSteeringError   the `steering` field breaks the contract; `violations` lists every mistake with its field
├── UnknownBundleError     a bundle, latent or vector that the server has not loaded
├── InvalidBundleError     the bytes that were to be loaded are no bundle for the server's model
├── ConflictError          another bundle has that name, or it is pinned
├── UnsupportedError       this server, model or engine cannot do it
├── InvalidExperimentError the definition of an experiment breaks a rule; `violations` lists every one
├── UnknownExperimentError no experiment has that key
├── ExperimentStateError   the experiment's state does not allow the change
├── StaleRevisionError     somebody else changed the experiment since it was read
├── NotAppliedError        the reply was not steered as asked, or carries no proof that it was
└── CallError              whatever else a call over gRPC fails of: keys, quotas, time-outs, the connection
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openai

__all__ = [
    "CallError",
    "ConflictError",
    "ExperimentStateError",
    "InvalidBundleError",
    "InvalidExperimentError",
    "InvalidSteeringError",
    "NotAppliedError",
    "StaleRevisionError",
    "TrimtabError",
    "UnknownBundleError",
    "UnknownExperimentError",
    "UnsupportedError",
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
    """Base of the tree."""

    code = "internal"
    """Stable; the server's `error.code`."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        violations: tuple[Violation, ...] = (),
        request_id: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The first field that is wrong."""
        self.violations = violations
        self.request_id = request_id
        """Quote it to whoever runs the server; None when the mistake was found before sending."""
        self.status = status
        """HTTP status; None when the mistake was found before sending, or in the middle of a stream."""

    @staticmethod
    def kind(code: str) -> type[TrimtabError] | None:
        """The error of a stable code; None if it is about something else than steering."""
        return next((kind for kind in _KINDS if kind.code == code), None)

    @staticmethod
    def of(error: openai.APIError) -> TrimtabError | None:
        """The steering error that an exception of the stock `openai` SDK carries; None if it is about something else."""
        kind = TrimtabError.kind(error.code or "")
        if kind is None:
            return None
        body: dict[str, Any] = error.body if isinstance(error.body, dict) else {}
        listed = body.get("violations")
        violations = tuple(
            Violation(str(item["field"]), str(item["message"]))
            for item in (listed if isinstance(listed, list) else [])
            if isinstance(item, dict) and {"field", "message"} <= item.keys()
        )
        return kind(
            str(body.get("message") or error.message),
            param=error.param,
            violations=violations,
            request_id=getattr(error, "request_id", None),
            status=getattr(error, "status_code", None),
        )


class InvalidSteeringError(TrimtabError):
    """The `steering` field cannot be served as asked; nothing was run."""

    code = "invalid_steering"


class UnknownBundleError(TrimtabError):
    """The server has not loaded that bundle."""

    code = "unknown_bundle"


class InvalidBundleError(TrimtabError):
    """The bytes are no bundle, or one that was made for another model."""

    code = "invalid_bundle"


class ConflictError(TrimtabError):
    """Another bundle has that name, or the bundle is pinned."""

    code = "conflict"


class UnsupportedError(TrimtabError):
    """This server, model or engine cannot do what was asked."""

    code = "unsupported"


class InvalidExperimentError(TrimtabError):
    """The experiment cannot be run as it is written; nothing was stored."""

    code = "invalid_experiment"


class UnknownExperimentError(TrimtabError):
    """No experiment has that key."""

    code = "unknown_experiment"


class ExperimentStateError(TrimtabError):
    """The experiment's state does not allow the change."""

    code = "experiment_state"


class StaleRevisionError(TrimtabError):
    """The experiment has changed since it was read; read it again."""

    code = "stale_revision"


class NotAppliedError(TrimtabError):
    """The reply was not steered as asked, or carries no proof that it was."""

    code = "steering_not_applied"


class CallError(TrimtabError):
    """A call over gRPC failed, and not of its steering."""

    def __init__(self, message: str, *, code: str, grpc_code: str, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.code = code
        """Stable; the server's reason in lower case, or gRPC's own code where no server answered."""
        self.grpc_code = grpc_code
        """gRPC's code, `UNAVAILABLE`."""


_KINDS: tuple[type[TrimtabError], ...] = (
    InvalidSteeringError,
    UnknownBundleError,
    InvalidBundleError,
    ConflictError,
    UnsupportedError,
    InvalidExperimentError,
    UnknownExperimentError,
    ExperimentStateError,
    StaleRevisionError,
    NotAppliedError,
)
