"""One prompt with one seed under several steerings, and what each arm said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from openai import BaseModel

from trimtab.client.calls import must_be_applied
from trimtab.client.errors import InvalidSteeringError, NotAppliedError
from trimtab.client.proof import Applied, require_applied
from trimtab.client.spec import Steering

__all__ = ["Arm", "ArmReply", "Comparison", "Gathered", "Piece", "RawPiece", "body"]


@dataclass(frozen=True)
class Arm:
    """One side of a comparison."""

    steering: Steering | None = None
    """None steers nothing: the control."""
    system_prompt: str | None = None
    """Said before the chat, in place of steering or beside it."""


Arms = Mapping[str, "Arm | Steering | None"]
"""By name; a `Steering` alone is an arm that is steered so, None is the control."""


@dataclass(frozen=True)
class ArmReply:
    """What one arm said."""

    text: str
    finish_reason: str | None
    steering: Applied


@dataclass(frozen=True)
class Comparison:
    """What all arms said."""

    seed: int
    """Of every arm: the same seed gives the same draws."""
    arms: Mapping[str, ArmReply]
    """By name, in the order that was asked for."""

    def __getitem__(self, name: str) -> ArmReply:
        return self.arms[name]


@dataclass(frozen=True)
class Piece:
    """What is new of one arm."""

    arm: str
    text: str


class RawPiece(BaseModel):
    """A piece as it comes over the wire."""

    arm: int
    name: str
    seed: int
    chunk: dict[str, Any]


def body(arms: Arms, params: Mapping[str, Any], extra_body: Mapping[str, object] | None) -> dict[str, Any]:
    """The JSON of a comparison."""
    if not arms:
        raise InvalidSteeringError("arms: give at least one, such as {'control': None}", param="arms")
    listed = []
    for name, arm in arms.items():
        arm = arm if isinstance(arm, Arm) else Arm(arm)
        said: dict[str, Any] = {"name": name}
        if arm.steering is not None:
            said["steering"] = arm.steering.to_dict()
        if arm.system_prompt is not None:
            said["system_prompt"] = arm.system_prompt
        listed.append(said)
    given = {name: value for name, value in params.items() if value is not None}
    return {**given, **(extra_body or {}), "arms": listed, "stream": True}


@dataclass
class _Said:
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    steering: dict[str, Any] | None = None


class Gathered:
    """A comparison, gathered while its pieces pass."""

    def __init__(self, arms: Arms) -> None:
        self._arms = {name: arm if isinstance(arm, Arm) else Arm(arm) for name, arm in arms.items()}
        self._said = {name: _Said() for name in arms}
        self._seed: int | None = None

    def saw(self, raw: RawPiece) -> Piece:
        """Takes note of one piece."""
        said = self._said[raw.name]
        self._seed = raw.seed
        said.steering = raw.chunk.get("steering") or said.steering
        text = ""
        for choice in raw.chunk.get("choices") or ():
            text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            said.finish_reason = choice.get("finish_reason") or said.finish_reason
        said.text.append(text)
        return Piece(raw.name, text)

    def whole(self) -> Comparison:
        """The comparison, when its stream is complete.

        Raises:
            NotAppliedError: an arm says nothing of what was applied to it, or was not steered as asked.
        """
        if self._seed is None:
            raise NotAppliedError("the comparison is empty: the server is no Trimtab server, or a proxy dropped it")
        replies = {}
        for name, said in self._said.items():
            proof = {"steering": said.steering}
            try:
                ask = self._arms[name].steering
                applied = require_applied(proof) if must_be_applied(ask) else Applied.of(proof)
            except NotAppliedError as e:
                raise NotAppliedError(f"arm {name!r}: {e.message}", request_id=e.request_id) from e
            replies[name] = ArmReply("".join(said.text), said.finish_reason, applied)
        return Comparison(self._seed, MappingProxyType(replies))
