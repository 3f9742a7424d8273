"""A chat with one server, whose steering can be changed between two turns: what `trimtab chat` is a face of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from trimtab.client.errors import InvalidSteeringError
from trimtab.client.http import Trimtab
from trimtab.client.proof import Applied
from trimtab.client.spec import Edit, Gate, Steering, Window

__all__ = ["Conversation", "parse_steering"]


class Conversation:
    """The turns so far, and what steers the next one."""

    def __init__(
        self,
        client: Trimtab,
        model: str,
        *,
        steering: Steering | None = None,
        system_prompt: str | None = None,
        **sampling: Any,
    ) -> None:
        self._client = client
        self.model = model
        self.steering = steering
        """What `is_on` turns on and off; None until there is something to steer."""
        self.is_on = steering is not None
        self.system_prompt = system_prompt
        self.turns: list[dict[str, Any]] = []
        self.applied: Applied | None = None
        """What was applied to the last reply."""
        self._sampling = {name: value for name, value in sampling.items() if value is not None}

    def say(self, text: str) -> Iterator[str]:
        """The reply as it comes; when it fails, the turn has not happened.

        Raises:
            TrimtabError: it was not steered as asked, or was refused.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        steering = self.steering if self.is_on else None
        messages: Any = [*system, *asked]
        stream = self._client.chat.completions.create(
            model=self.model, messages=messages, steering=steering, stream=True, **self._sampling
        )
        said = []
        with stream:
            for chunk in stream:
                for choice in chunk.choices:
                    said.append(choice.delta.content or "")
                    yield said[-1]
        self.applied = stream.steering
        self.turns = [*asked, {"role": "assistant", "content": "".join(said)}]

    def forget(self) -> None:
        """Begin anew, with the same steering."""
        self.turns = []


def parse_steering(text: str) -> Steering:
    """The steering that someone typed: `calm`, `calm:0.8`, or the JSON of the `steering` field.

    Raises:
        InvalidSteeringError: it is none.
    """
    if text.startswith("{"):
        return _of_json(text)
    name, _, strength = text.partition(":")
    try:
        return Steering(bundle=name, strength=float(strength) if strength else 1.0)
    except ValueError as e:
        raise InvalidSteeringError(f"{strength!r} is no strength; write calm:0.8", param="strength") from e


def _of_json(text: str) -> Steering:
    try:
        field = json.loads(text)
        if "edits" in field:
            field["edits"] = [_edit(edit) for edit in field["edits"]]
        return Steering(**field)
    except (KeyError, TypeError, ValueError) as e:
        raise InvalidSteeringError(f"this is no `steering` field ({e}); see GET /v1/steering/schema") from e


def _edit(fields: dict[str, Any]) -> Edit:
    """The edit of its JSON, the other way than `Edit.to_dict`."""
    rest = dict(fields)
    scope, gate = rest.pop("scope", {}), rest.pop("gate", None)
    name = {"add": "amount", "clamp": "target", "scale": "factor"}.get(rest["operation"])
    value = rest.pop(name) if name is not None else None
    edit = Edit(**{"latent": None, "vector": None, "value": value, **rest})
    if "window" in scope:
        edit = replace(edit, positions=Window(**{"start": None, "stop": None, "origin": "start", **scope["window"]}))
    edit = replace(edit, **{key: part for key, part in scope.items() if key != "window"})
    if gate is None:
        return edit
    return replace(edit, gate=Gate(**{"unit": "raw", "mode": "token", "bundle": None, **gate}))
