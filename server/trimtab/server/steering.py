"""The `steering` field of a request: what a caller may write, parsed and validated, every violation at once.

    {"bundle": "calm", "strength": 0.8}                                                    a bundle's recommended edits
    {"edits": [{"bundle": "calm", "latent": 5120, "operation": "clamp", "target": 0.0}]}   free-form edits

Token scopes partition a request by what a position predicts, so that they agree with attribution's scope:

    prompt      positions 1 … n_prompt − 2
    completion  positions n_prompt − 1 … end: the last prompt token predicts the first completion token
    all         both

Position 0 is the attention sink, whose norm is two orders above the others'; it is left alone unless `first_token` is set.
A window narrows that further, half open, counted from one of three origins:

    start        absolute positions
    prompt_end   from n_prompt: −5 … 0 are the last five tokens of the prompt
    completion   by completion token: token j is predicted at position n_prompt − 1 + j

A gate opens an edit only where another latent of the same layer fires, read from the unedited stream and on the tokens of the
edit's own scope alone: on that token (`token`), or on it and every later one of the request (`onward`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.attribution.edit import Operation
from trimtab.server.errors import InvalidSteering, Violation

__all__ = [
    "MAX_EDITS",
    "MAX_POSITION",
    "MAX_STRENGTH",
    "Edit",
    "Gate",
    "GateMode",
    "Origin",
    "PositionWindow",
    "Scope",
    "ScopeTokens",
    "Steering",
    "parse_steering",
]

MAX_EDITS = 64
MAX_STRENGTH = 100.0
MAX_POSITION = 2**31 - 1
ScopeTokens = Literal["prompt", "completion", "all"]
Origin = Literal["start", "prompt_end", "completion"]
GateMode = Literal["token", "onward"]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Strength = Annotated[float, Field(allow_inf_nan=False, strict=True, ge=-MAX_STRENGTH, le=MAX_STRENGTH)]


Position = Annotated[int, Field(strict=True, ge=-MAX_POSITION, le=MAX_POSITION)]
LatentIndex = Annotated[int, Field(strict=True, ge=0)]


class _Field(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PositionWindow(_Field):
    """A half-open window of positions, [start, stop) from an origin; null is open."""

    origin: Origin = "start"
    start: Position | None = None
    stop: Position | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.origin != "prompt_end" and min(self.start or 0, self.stop or 0) < 0:
            raise ValueError(f"positions from `{self.origin}` are not negative; `prompt_end` counts backwards")
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise ValueError(f"holds no token: it is half open, and {self.start} is not before {self.stop}")
        return self


class Scope(_Field):
    """Which tokens an edit touches."""

    tokens: ScopeTokens = "all"
    window: PositionWindow | None = None
    """Only the tokens of this window."""
    exclude_special: bool = False
    """Leave alone the positions whose token is one of the tokenizer's special ones."""
    first_token: bool = False
    """Edit position 0 too (the attention sink)."""


class Gate(_Field):
    """A condition on another latent of the same layer, on the tokens of the edit's scope."""

    bundle: str | None = None
    """The edit's own when null."""
    latent: LatentIndex
    above: Annotated[float, Field(allow_inf_nan=False, strict=True, ge=0)]
    """The edit applies where the latent's activation is larger than this; 0 is wherever it fires."""
    unit: Literal["raw", "max_act"] = "raw"
    mode: GateMode = "token"
    """`token`: on such tokens. `onward`: from the first such token on, that token included."""


_VALUE = {"add": "amount", "clamp": "target", "scale": "factor"}
"""The field of the number that an operation takes."""


class Edit(_Field):
    """One free-form edit of a request."""

    bundle: str
    latent: LatentIndex | None = None
    vector: str | None = None
    operation: Operation
    amount: Number | None = None
    """For `add`: how much, in `unit`."""
    target: Number | None = None
    """For `clamp`: the activation to clamp to, in `unit`."""
    factor: Number | None = None
    """For `scale`: what the activation is multiplied by."""
    unit: Literal["raw", "max_act", "resid_norm"] = "raw"
    strength: Strength = 1.0
    scope: Scope = Scope()
    gate: Gate | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.latent is None) == (self.vector is None):
            raise ValueError("name exactly one of `latent` and `vector`")
        wanted = _VALUE.get(self.operation)
        for name, value in (("amount", self.amount), ("target", self.target), ("factor", self.factor)):
            if (value is not None) != (name == wanted):
                raise ValueError(f"`{self.operation}` {'needs' if value is None else 'takes no'} `{name}`")
        if self.unit != "raw" and self.operation not in ("add", "clamp"):
            raise ValueError(f"`unit` goes with add and clamp, not with {self.operation}")
        if self.vector is None:
            return self
        if self.operation not in ("add", "project"):
            raise ValueError(f"`{self.operation}` needs a latent; a dense vector can be added or projected out")
        if self.unit == "max_act":
            raise ValueError("a dense vector has no largest activation; use unit `raw` or `resid_norm`")
        return self

    @property
    def value(self) -> float:
        """The one number of the operation, 0 where it takes none."""
        for given in (self.amount, self.target, self.factor):
            if given is not None:
                return given
        return 0.0


class Steering(_Field):
    """The `steering` field of a request: a bundle's recommended edits, or free-form edits."""

    bundle: str | None = None
    edits: Annotated[tuple[Edit, ...], Field(max_length=MAX_EDITS)] | None = None
    strength: Strength = 1.0
    on_failure: Literal["closed", "open"] = "closed"
    """`closed`: a reply that was not steered as asked is an error. `open`: it is returned, and says so."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.edits == ():
            raise ValueError("`edits` is empty; leave `steering` out for an unsteered reply")
        if (self.bundle is None) == (self.edits is None):
            raise ValueError("give exactly one of `bundle` (its recommended edits) and `edits`")
        return self


def parse_steering(value: Any) -> Steering:
    """The validated `steering` field.

    Raises:
        InvalidSteering: with every violation at once, each with the path of its field.
    """
    if not isinstance(value, Mapping):
        raise InvalidSteering([Violation("steering", f"must be an object, not {type(value).__name__}")])
    try:
        return Steering.model_validate(value)
    except ValidationError as e:
        raise InvalidSteering([_violation(error) for error in e.errors()]) from e


def _violation(error: Any) -> Violation:
    path = "steering"
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    if error["type"] == "extra_forbidden":
        return Violation(path, f"unknown field {error['loc'][-1]!r}; see GET /v1/steering/schema for the fields")
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    return Violation(path, f"{message}, not {str(given)[:40]!r}" if isinstance(given, str | int | float) else message)
