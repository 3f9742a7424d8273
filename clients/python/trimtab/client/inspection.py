"""What a bundle's latents read in a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.client.bundles import read
from trimtab.client.proof import Applied
from trimtab.client.spec import Steering

__all__ = ["InspectedToken", "Inspection", "LatentActivation", "body", "read_inspection"]


@dataclass(frozen=True)
class LatentActivation:
    """How strongly a latent fires on a token."""

    latent: int
    activation: float
    """In SAE units, above 0."""
    fraction_of_max: float
    """The same as a fraction of the latent's largest activation."""


@dataclass(frozen=True)
class InspectedToken:
    """A token and what fires on it, strongest first; nothing on the first one, the attention sink."""

    id: int
    text: str
    latents: tuple[LatentActivation, ...]


@dataclass(frozen=True)
class Inspection:
    """A text, token by token."""

    hook_point: str
    content_hash: str
    """Of the bundle."""
    tokens: tuple[InspectedToken, ...]
    steering: Applied
    """What was applied while it was read."""


def body(
    bundle: str,
    prompt: str | Sequence[int] | None,
    messages: Iterable[Mapping[str, Any]] | None,
    top_count: int,
    steering: Steering | None,
) -> dict[str, Any]:
    """The JSON of an inspection."""
    asked: dict[str, Any] = {"bundle": bundle, "top_count": top_count}
    if prompt is not None:
        asked["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    if messages is not None:
        asked["messages"] = list(messages)
    return asked | ({} if steering is None else {"steering": steering.to_dict()})


def read_inspection(document: Any) -> Inspection:
    """The answer to an inspection."""

    def parse(answer: Any) -> Inspection:
        tokens = tuple(
            InspectedToken(
                int(token["id"]),
                str(token["text"]),
                tuple(
                    LatentActivation(int(a["latent"]), float(a["activation"]), float(a["fraction_of_max"]))
                    for a in token["latents"]
                ),
            )
            for token in answer["tokens"]
        )
        return Inspection(str(answer["hook_point"]), str(answer["content_hash"]), tokens, Applied.of(answer))

    return read(parse, document)
