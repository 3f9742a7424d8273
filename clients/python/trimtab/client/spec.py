"""What to steer: frozen values that become the `steering` field of a request.

    Steering(bundle="calm", strength=0.8)                                      the recommended edits of a bundle
    Steering(edits=[Latent("calm", 5120).clamp(0.0).during("completion")])     edits of your own
    Steering(edits=[Vector("calm", "difference_in_means").add(0.5, unit="resid_norm")])

    Latent("calm", 5120).ablate().window(-5, 0, origin="prompt_end")           the last five tokens of the prompt
    Latent("calm", 5120).clamp(0.0).gated(77, above=1.5, mode="onward")        once latent 77 has fired above 1.5
    Latent("calm", 5120).scale(3.0).excluding_special()                        not on the chat template's marks

Strength multiplies: 0 is off, 1 as authored. What can be seen to be wrong without a server raises at once; the rest (bundles,
latents, ranges) is the server's to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

from trimtab.client.errors import InvalidSteeringError, Violation

__all__ = ["MAX_EDITS", "MAX_STRENGTH", "Edit", "Gate", "Latent", "Steering", "Vector", "Window"]

MAX_EDITS = 64
MAX_STRENGTH = 100.0

Operation = Literal["add", "ablate", "clamp", "scale", "project"]
Unit = Literal["raw", "max_act", "resid_norm"]
Tokens = Literal["prompt", "completion", "all"]
Origin = Literal["start", "prompt_end", "completion"]
GateMode = Literal["token", "onward"]
OnFailure = Literal["closed", "open"]
_VALUE_FIELD = {"add": "amount", "clamp": "target", "scale": "factor"}


class OpenAIKwargs(TypedDict):
    """Keyword arguments for `create` of a stock OpenAI client."""

    extra_body: dict[str, Any]


@dataclass(frozen=True)
class Window:
    """A half-open window of positions, [start, stop) from an origin; None is open."""

    start: int | None
    stop: int | None
    origin: Origin

    def __post_init__(self) -> None:
        if self.origin != "prompt_end" and min(self.start or 0, self.stop or 0) < 0:
            raise _invalid(
                "steering.window", f"positions from `{self.origin}` are not negative; `prompt_end` counts backwards"
            )
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise _invalid(
                "steering.window", f"holds no token: it is half open, and {self.start} is not before {self.stop}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The window as JSON, with open ends left out."""
        ends = (("start", self.start), ("stop", self.stop))
        return {"origin": self.origin} | {name: position for name, position in ends if position is not None}


@dataclass(frozen=True)
class Gate:
    """A condition on another latent of the same layer."""

    latent: int
    above: float
    unit: Literal["raw", "max_act"]
    mode: GateMode
    bundle: str | None
    """None: the edit's own."""

    def __post_init__(self) -> None:
        _finite("gate.above", self.above)
        if self.above < 0:
            raise _invalid(
                "steering.gate.above", f"{self.above} is negative, and an activation never is; 0 is wherever it fires"
            )

    def to_dict(self) -> dict[str, Any]:
        """The gate as JSON, with defaults left out."""
        fields: dict[str, Any] = {} if self.bundle is None else {"bundle": self.bundle}
        fields |= {"latent": self.latent, "above": float(self.above)}
        if self.unit != "raw":
            fields["unit"] = self.unit
        return fields | ({"mode": self.mode} if self.mode != "token" else {})


@dataclass(frozen=True)
class Edit:
    """One operation on one direction; `Latent` and `Vector` make it."""

    bundle: str
    """A bundle that is loaded in the server."""
    latent: int | None
    vector: str | None
    operation: Operation
    value: float | None
    """`add`: amount; `clamp`: target; `scale`: factor; `ablate` and `project` have none."""
    unit: Unit = "raw"
    """What an amount or a target is measured in."""
    strength: float = 1.0
    tokens: Tokens = "all"
    first_token: bool = False
    """Edit position 0 too, the attention sink."""
    positions: Window | None = None
    exclude_special: bool = False
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.value is not None:
            _finite(_VALUE_FIELD[self.operation], self.value)
        _strength(self.strength)

    def during(self, tokens: Tokens, *, first_token: bool = False) -> Edit:
        """The same edit on the prompt's tokens, the completion's, or all."""
        return replace(self, tokens=tokens, first_token=first_token)

    def window(self, start: int | None = None, stop: int | None = None, *, origin: Origin = "start") -> Edit:
        """The same edit on the tokens of a half-open window: counted from the start, from the prompt's end (negative before it),
        or by completion token."""
        return replace(self, positions=Window(start, stop, origin))

    def excluding_special(self) -> Edit:
        """The same edit, but not on special tokens, such as the marks of a chat template."""
        return replace(self, exclude_special=True)

    def gated(
        self,
        latent: int,
        *,
        above: float,
        unit: Literal["raw", "max_act"] = "raw",
        mode: GateMode = "token",
        bundle: str | None = None,
    ) -> Edit:
        """The same edit where another latent's activation is `above`; `onward`: from the first such token of its scope on."""
        return replace(self, gate=Gate(latent, above, unit, mode, bundle))

    def at(self, strength: float) -> Edit:
        """The same edit at another strength."""
        return replace(self, strength=strength)

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON, with defaults left out."""
        fields: dict[str, Any] = {"bundle": self.bundle}
        if self.latent is not None:
            fields["latent"] = self.latent
        if self.vector is not None:
            fields["vector"] = self.vector
        fields["operation"] = self.operation
        if self.value is not None:
            fields[_VALUE_FIELD[self.operation]] = float(self.value)
        if self.unit != "raw":
            fields["unit"] = self.unit
        if self.strength != 1.0:
            fields["strength"] = float(self.strength)
        scope: dict[str, Any] = {"tokens": self.tokens} if self.tokens != "all" else {}
        if self.positions is not None:
            scope["window"] = self.positions.to_dict()
        scope |= {name: True for name in ("exclude_special", "first_token") if getattr(self, name)}
        if scope:
            fields["scope"] = scope
        return fields | ({"gate": self.gate.to_dict()} if self.gate is not None else {})


@dataclass(frozen=True)
class Latent:
    """A latent that a bundle holds, by its index in the SAE; each method is one operation on it."""

    bundle: str
    latent: int

    def add(self, amount: float, *, unit: Unit = "raw") -> Edit:
        """Adds `amount` of the decoder direction, whatever the activation."""
        return self._edit("add", amount, unit)

    def ablate(self) -> Edit:
        """Removes the latent's own contribution."""
        return self._edit("ablate", None)

    def clamp(self, target: float, *, unit: Unit = "raw") -> Edit:
        """Sets the activation to `target`."""
        return self._edit("clamp", target, unit)

    def scale(self, factor: float) -> Edit:
        """Multiplies the activation by `factor`."""
        return self._edit("scale", factor)

    def project(self) -> Edit:
        """Replaces the stream's projection on the direction by its baseline."""
        return self._edit("project", None)

    def _edit(self, operation: Operation, value: float | None, unit: Unit = "raw") -> Edit:
        return Edit(self.bundle, self.latent, None, operation, value, unit)


@dataclass(frozen=True)
class Vector:
    """A dense direction that a bundle holds, by name: it can be added or projected out."""

    bundle: str
    vector: str

    def add(self, amount: float, *, unit: Literal["raw", "resid_norm"] = "raw") -> Edit:
        """Adds `amount` of the vector."""
        return Edit(self.bundle, None, self.vector, "add", amount, unit)

    def project(self) -> Edit:
        """Removes the stream's projection on the vector."""
        return Edit(self.bundle, None, self.vector, "project", None)


@dataclass(frozen=True)
class Steering:
    """The `steering` field of a request: a bundle's recommended edits, or edits of your own."""

    bundle: str | None = None
    edits: tuple[Edit, ...] = ()
    strength: float = 1.0
    """Multiplies every edit; 0 is off, 1 as authored."""
    on_failure: OnFailure | None = None
    """`closed`: a reply that was not steered as asked is an error. `open`: it is returned, and says so. None: the server's
    default, which is `closed` unless its operator said otherwise."""

    def __init__(
        self,
        *,
        bundle: str | None = None,
        edits: Iterable[Edit] = (),
        strength: float = 1.0,
        on_failure: OnFailure | None = None,
    ) -> None:
        edits = tuple(edits)
        if (bundle is None) == (not edits):
            raise _invalid("steering", "give exactly one of `bundle` (its recommended edits) and `edits`")
        if len(edits) > MAX_EDITS:
            raise _invalid("steering.edits", f"{len(edits)} edits are more than {MAX_EDITS}; merge or drop some")
        _strength(strength)
        for name, value in (("bundle", bundle), ("edits", edits), ("strength", strength), ("on_failure", on_failure)):
            object.__setattr__(self, name, value)

    @property
    def is_off(self) -> bool:
        """Whether it asks for nothing: every strength is 0."""
        return self.strength == 0 or (bool(self.edits) and all(edit.strength == 0 for edit in self.edits))

    def at(self, strength: float) -> Steering:
        """The same edits at another strength."""
        return Steering(bundle=self.bundle, edits=self.edits, strength=strength, on_failure=self.on_failure)

    def to_dict(self) -> dict[str, Any]:
        """The `steering` field as JSON, with defaults left out."""
        fields: dict[str, Any] = (
            {"bundle": self.bundle} if self.bundle is not None else {"edits": [edit.to_dict() for edit in self.edits]}
        )
        if self.strength != 1.0:
            fields["strength"] = float(self.strength)
        if self.on_failure is not None:
            fields["on_failure"] = self.on_failure
        return fields

    def openai(self) -> OpenAIKwargs:
        """Keyword arguments for `create` of a stock OpenAI client."""
        return {"extra_body": {"steering": self.to_dict()}}


def _finite(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise _invalid(f"steering.{field}", f"{value} is not a finite number")


def _strength(value: float) -> None:
    _finite("strength", value)
    if abs(value) > MAX_STRENGTH:
        raise _invalid("steering.strength", f"{value} is outside -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}; 1 is as authored")


def _invalid(field: str, message: str) -> InvalidSteeringError:
    return InvalidSteeringError(f"{field}: {message}", param=field, violations=(Violation(field, message),))
