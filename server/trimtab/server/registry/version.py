"""One version of a bundle, and its life as pure functions: draft → active → revoked.

draft     stored, and named by no request
active    requests may name it: `calm:v3`, and `calm` while it is the default of that name
revoked   for good: no request can name it, and its bytes cannot come back under another number
"""

import re
from dataclasses import dataclass
from typing import Literal

from trimtab.server.errors import Conflict, InvalidRequest, Violation

__all__ = ["Running", "State", "Version", "require_active", "require_promotable", "split"]

State = Literal["draft", "active", "revoked"]
Running = Literal["end", "finish"]
"""What becomes of the requests that run on a revoked bundle: they end with an error, or they finish."""

_REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63}):v(?P<number>[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Version:
    """A version as the registry lists it; its bytes are looked up by `file_digest`."""

    name: str
    """The bundle's own, from its header."""
    number: int
    """1, 2, 3, …: given by the registry, never given again."""
    state: State
    is_default: bool
    """`name` alone means this version."""
    content_hash: str
    """The bundle's own: what plans and proofs name."""
    file_digest: str
    """SHA-256 of the file: what is signed."""
    n_bytes: int
    model: str
    fingerprint: str
    """Of the one model that it was made for; other servers list it and do not load it."""
    hook_point: str
    behaviour: str
    signature: str | None
    """As it was uploaded; whether it counts is for each server to check, against the keys that it trusts."""
    created_at: str
    created_by: str
    changed_at: str
    reason: str
    """Of the last change of state."""
    running: Running | None
    """Of a revoked version."""

    @property
    def reference(self) -> str:
        """`calm:v3`: what requests and proofs call it."""
        return f"{self.name}:v{self.number}"


def split(reference: str) -> tuple[str, int]:
    """Name and number of `calm:v3`.

    Raises:
        InvalidRequest: it is no such reference.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise InvalidRequest([Violation("version", f"{reference[:80]!r} is no `name:vN`, such as calm:v3")])
    return match["name"], int(match["number"])


def require_promotable(version: Version) -> None:
    """Nothing, if the version may become active.

    Raises:
        Conflict: it is revoked.
    """
    if version.state == "revoked":
        raise Conflict(
            f"{version.reference} was revoked ({version.reason}), for good; upload a new version", field="version"
        )


def require_active(version: Version) -> None:
    """Nothing, if requests may name the version.

    Raises:
        Conflict: they may not.
    """
    if version.state != "active":
        raise Conflict(
            f"{version.reference} is {version.state}; only an active version can be the default", field="version"
        )
