"""The proof in a reply: what the engine counted while it steered, and `require_applied`, which accepts nothing less.

It reads any reply that carries a `steering` object: this client's, the stock `openai` SDK's, a chunk of a stream, a plain dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

from trimtab.client.errors import NotAppliedError

__all__ = ["Applied", "Enrolled", "HookPoint", "require_applied"]


@dataclass(frozen=True)
class HookPoint:
    """What was applied at one hook point."""

    prompt_tokens: int
    """Prompt positions in scope, edited in this request's own forward passes."""
    completion_tokens: int
    """Positions in scope that predict completion tokens, likewise."""
    cached_prompt_tokens: int
    """Prompt positions in scope whose edited state came from the prefix cache."""
    gate_firings: int
    """Of those that were not cached, the positions on which a gate was open."""
    special_tokens: int
    """Of the same, those that an edit left alone because their token is special."""
    max_relative_norm: float
    """Largest ‖Δ‖/‖h‖ over the same."""
    mean_relative_norm: float
    """Mean ‖Δ‖/‖h‖ over the same."""


@dataclass(frozen=True)
class Enrolled:
    """The part of a reply in an experiment; a key that is blinded is not told."""

    key: str
    """The experiment's."""
    arm: str


@dataclass(frozen=True)
class Applied:
    """What was applied to one reply, counted where it was applied."""

    status: str
    """`applied`, `not_requested` or `failed_open`; `requested` in the first chunk of a stream."""
    plan: str | None
    """Canonical hash of the edits; the same edits spelt differently have the same."""
    bundles: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    gate_firings: int
    special_tokens: int
    max_relative_norm: float
    mean_relative_norm: float
    hook_points: Mapping[str, HookPoint]
    """By name, `blocks.14.resid_post`."""
    reason: str | None = None
    """Why the reply was not steered as asked, when it failed open."""
    experiment: Enrolled | None = None
    """The experiment whose arm the server gave; None if it is in none."""

    @property
    def n_tokens(self) -> int:
        """Edited tokens in all, those from the prefix cache too."""
        return self.prompt_tokens + self.completion_tokens + self.cached_prompt_tokens

    def __str__(self) -> str:
        """One line, for people."""
        if self.status != "applied":
            return self.status + (f": {self.reason}" if self.reason else "")
        where = ", ".join(self.hook_points) or "no hook point"
        return (
            f"applied {(self.plan or '')[:19]}… at {where}: {self.prompt_tokens} prompt tokens, "
            f"{self.completion_tokens} completion tokens, {self.cached_prompt_tokens} from the cache, "
            f"largest ‖Δ‖/‖h‖ {self.max_relative_norm:.3f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The `steering` object of a reply, as JSON."""
        points = {name: asdict(point) for name, point in self.hook_points.items()}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("experiment", "hook_points")}
        told = {} if self.experiment is None else {"experiment": asdict(self.experiment)}
        return {**own, "bundles": list(self.bundles), "hook_points": points, **told}

    @classmethod
    def of(cls, reply: object) -> Applied:
        """The proof that a reply carries.

        Raises:
            NotAppliedError: it carries none, or one that cannot be read.
        """
        raw = raw_proof(reply)
        if raw is None:
            raise NotAppliedError(
                "the reply carries no `steering` object: the server is no Trimtab server, or a proxy dropped it; "
                "nothing shows that the reply was steered",
                request_id=_request_id(reply),
            )
        try:
            points = {str(name): HookPoint(**_counts(point)) for name, point in raw.get("hook_points", {}).items()}
            plan, enrolled = raw.get("plan"), raw.get("experiment")
            return cls(
                status=str(raw["status"]),
                plan=None if plan is None else str(plan),
                bundles=tuple(str(name) for name in raw.get("bundles", ())),
                hook_points=MappingProxyType(points),
                reason=raw.get("reason"),
                experiment=None if enrolled is None else Enrolled(str(enrolled["key"]), str(enrolled["arm"])),
                **_counts(raw),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise NotAppliedError(
                f"the reply's `steering` object cannot be read ({e!r}); use a client of the server's own release",
                request_id=_request_id(reply),
            ) from e


def require_applied(reply: object) -> Applied:
    """The proof of a reply that was steered as asked; of a stream, give the last chunk.

    Raises:
        NotAppliedError: the reply carries no proof, its status is not `applied`, it names no plan, or no token was edited.
    """
    applied = Applied.of(reply)
    if applied.status != "applied":
        problem = f"its status is {applied.status!r}"
    elif not applied.plan:
        problem = "its proof names no plan"
    elif not applied.n_tokens:
        problem = "not one token was in scope and edited"
    else:
        return applied
    raise NotAppliedError(f"the reply was not steered as asked: {problem}", request_id=_request_id(reply))


def raw_proof(reply: object) -> dict[str, Any] | None:
    """The reply's `steering` object as it came; None if there is none."""
    reply = getattr(reply, "response", reply)  # an event of `/v1/responses` holds the response
    extra = reply if isinstance(reply, Mapping) else getattr(reply, "model_extra", None)
    raw = extra.get("steering") if isinstance(extra, Mapping) else None
    return raw if isinstance(raw, dict) else None


def _counts(raw: Mapping[str, Any]) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for name in ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "gate_firings", "special_tokens"):
        counts[name] = int(raw.get(name, 0))
    for name in ("max_relative_norm", "mean_relative_norm"):
        counts[name] = float(raw.get(name) or 0.0)
    return counts


def _request_id(reply: object) -> str | None:
    value = getattr(reply, "_request_id", None)
    return value if isinstance(value, str) else None
