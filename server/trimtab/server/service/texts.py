"""The texts of a request and of its reply, as graders and samples of text have them, out of OpenAI's JSON. Pure."""

from collections.abc import Mapping
from typing import Any

__all__ = ["piece_of", "prompt_of", "reply_of"]


def prompt_of(document: Mapping[str, Any]) -> str:
    """What was asked: the prompt, or the last turn of the user."""
    for field in ("messages", "input"):
        turns = document.get(field)
        if isinstance(turns, list):
            said = [turn for turn in turns if isinstance(turn, Mapping) and turn.get("role") == "user"]
            return _text(said[-1].get("content")) if said else ""
    return _text(document.get("input", document.get("prompt")))


def reply_of(document: Mapping[str, Any]) -> str:
    """What was answered, in a whole reply; the first of several samples."""
    for choice in (document.get("choices") or ())[:1]:
        message = choice.get("message")
        return _text(message.get("content") if isinstance(message, Mapping) else choice.get("text"))
    items = document.get("output") or ()
    return "".join(_text(item.get("content")) for item in items if item.get("type") == "message")


def piece_of(document: Mapping[str, Any]) -> str:
    """What a chunk of a stream adds to it."""
    if document.get("type") == "response.output_text.delta":
        return _text(document.get("delta"))
    for choice in document.get("choices") or ():
        if choice.get("index", 0) == 0:
            delta = choice.get("delta")
            return _text(delta.get("content") if isinstance(delta, Mapping) else choice.get("text"))
    return ""


def _text(content: Any) -> str:
    match content:
        case str():
            return content
        case list():
            return "".join(_text(part.get("text")) for part in content if isinstance(part, Mapping))
        case _:
            return ""
