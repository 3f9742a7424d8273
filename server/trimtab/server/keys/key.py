"""A key, and what it allows. Pure.

    tt_ab12cd34ef_9fK2…        `tt_`, ten characters that are public and name the key, 256 random bits that are not

The public part is safe in logs and in the audit log. The secret part is shown once, when the key is made, and kept by nobody.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.server.errors import Forbidden, InvalidRequest, InvalidSteering, Violation
from trimtab.server.steering import MAX_STRENGTH, Steering

__all__ = ["ANONYMOUS", "OPERATOR", "SCOPES", "Caller", "Key", "Policy", "Scope", "make", "parse_scopes", "public_part"]

Scope = Literal["infer", "steer", "author", "observe", "admin", "force"]
"""`infer`: generate, with the recommended edits of bundles. `steer`: free-form edits. `author`: upload bundles. `observe`:
metrics, the audit log, results of experiments. `admin`: promote and revoke, keys, defaults, the kill switch, experiments.
`force`: ask for an arm of an experiment. None of them includes another."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

_KEY = re.compile(r"tt_(?P<id>[a-z2-7]{10})_(?P<secret>[A-Za-z0-9_-]{43})")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_REFERENCE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(:v[1-9][0-9]{0,8})?$"
Bound = Annotated[float, Field(allow_inf_nan=False, ge=-MAX_STRENGTH, le=MAX_STRENGTH)]


class Policy(BaseModel):
    """What a key's requests may ask for; nothing is limited unless said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: Annotated[tuple[Annotated[str, Field(pattern=_REFERENCE)], ...], Field(max_length=1000)] | None = None
    """Bundles that it may name: `calm` in every version, or `calm:v3` alone; null allows all."""
    strength: tuple[Bound, Bound] | None = None
    """Least and most strength, of the request times that of each edit; null allows all."""
    opt_out: bool = False
    """Whether its requests may leave the server's default steering out, or replace it."""
    blind: bool = False
    """Replies to its requests do not tell of which experiment and arm they are."""
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    concurrent_requests: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strength is not None and self.strength[0] > self.strength[1]:
            raise ValueError(f"strength: the least, {self.strength[0]}, is above the most, {self.strength[1]}")
        return self

    def allows_bundle(self, reference: str) -> bool:
        """Whether a bundle, by the reference that its name means, may be named."""
        return self.bundles is None or reference in self.bundles or reference.partition(":")[0] in self.bundles


@dataclass(frozen=True)
class Key:
    """A key as it is kept: all but the key."""

    id: str
    """The public part."""
    label: str
    """What it is for, for people."""
    digest: str
    """HMAC-SHA-256 of the whole key, hexadecimal."""
    scopes: frozenset[Scope]
    policy: Policy
    created_at: str
    created_by: str
    expires_at: str | None
    revoked_at: str | None
    rotated_from: str | None
    """The key that it took over from."""

    def is_valid(self, now: str) -> bool:
        """Whether it opens anything at a time, written as the database writes it."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True)
class Caller:
    """Who sends a request."""

    name: str
    """`key:ID`, `operator` or `anonymous`: what logs, metrics of limits and the audit log call it."""
    scopes: frozenset[Scope]
    policy: Policy

    @property
    def key_id(self) -> str | None:
        """The public part of its key, if it has one."""
        return self.name.removeprefix("key:") if self.name.startswith("key:") else None

    def require(self, scopes: Iterable[Scope]) -> None:
        """Nothing, if the caller has one of these scopes.

        Raises:
            Forbidden: it has none of them.
        """
        wanted = tuple(scopes)
        if self.scopes.isdisjoint(wanted):
            held = ", ".join(sorted(self.scopes)) or "none"
            raise Forbidden(f"this needs a key of scope {' or '.join(wanted)}; {self.name} has {held}")

    def check(self, steering: Steering, bundles: Mapping[str, str]) -> None:
        """Nothing, if the caller may ask for this; `bundles` are the references of the names in it.

        Raises:
            Forbidden: free-form edits without the scope, or a bundle that is not on its list.
            InvalidSteering: a strength outside its bounds.
        """
        if steering.edits is not None and "steer" not in self.scopes:
            raise Forbidden(
                f"free-form edits need a key of scope steer; with {self.name} name a bundle alone",
                field="steering.edits",
            )
        for name, reference in bundles.items():
            if not self.policy.allows_bundle(reference):
                raise Forbidden(
                    f"{self.name} may not use bundle {name!r}; its list is {self.policy.bundles}", field="steering"
                )
        if self.policy.strength is None:
            return
        least, most = self.policy.strength
        edits = steering.edits or ()
        asked = {f"steering.edits[{i}].strength": steering.strength * edit.strength for i, edit in enumerate(edits)}
        violations = [
            Violation(where, f"comes to {strength:g}; {self.name} allows {least:g} … {most:g}")
            for where, strength in (asked or {"steering.strength": steering.strength}).items()
            if not least <= strength <= most
        ]
        if violations:
            raise InvalidSteering(violations)


_ALL: frozenset[Scope] = frozenset(SCOPES)
ANONYMOUS = Caller("anonymous", _ALL, Policy(opt_out=True))
"""Whoever reaches a server without keys, which listens on loopback alone."""
OPERATOR = Caller("operator", _ALL, Policy(opt_out=True))
"""Whoever has the key that the server was started with."""


def make() -> tuple[str, str]:
    """A new key, whole, and its public part."""
    public = "".join(secrets.choice(_ALPHABET) for _ in range(10))
    return f"tt_{public}_{secrets.token_urlsafe(32)}", public


def public_part(text: str) -> str | None:
    """The public part of what may be a key."""
    match = _KEY.fullmatch(text)
    return match["id"] if match is not None else None


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """The scopes of these names.

    Raises:
        InvalidRequest: there are none, or there is no such scope.
    """
    given = tuple(names)
    unknown = [name for name in given if name not in SCOPES]
    if unknown or not given:
        raise InvalidRequest(
            [Violation("scopes", f"must be of {', '.join(SCOPES)}, not {', '.join(unknown) or 'none'}")]
        )
    return frozenset(scope for scope in SCOPES if scope in given)
