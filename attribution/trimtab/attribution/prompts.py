"""Prompts to sample from: a text file with one user message a line, or JSONL with `prompt` (raw text) or `messages` a line.

A pair file is a prompt file too: its completions are ignored, and a prompt that it holds twice counts once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.attribution.errors import PairsError

__all__ = ["Prompt", "load_prompts"]

_FIELDS = {"prompt", "messages", "id", "metadata", "positive", "negative"}


@dataclass(frozen=True)
class Prompt:
    """A raw prompt, or chat messages."""

    raw: str | None
    messages: tuple[tuple[str, str], ...]
    """(role, content) of each; empty when the prompt is raw."""

    @property
    def cluster(self) -> str:
        """What makes two prompts the same, as `Pair.prompt_key` does."""
        return json.dumps([self.raw, self.messages], ensure_ascii=False)

    @property
    def key(self) -> str:
        """Short and stable: names the prompt in journals."""
        return hashlib.sha256(self.cluster.encode()).hexdigest()[:12]

    @property
    def text(self) -> str:
        """What a grader is shown: the raw prompt, or the last message."""
        return self.raw if self.raw is not None else self.messages[-1][1]

    def fields(self) -> dict[str, Any]:
        """`prompt` or `messages`, as a pair file and a request have it."""
        if self.raw is not None:
            return {"prompt": self.raw}
        return {"messages": [{"role": role, "content": content} for role, content in self.messages]}


def load_prompts(path: Path) -> list[Prompt]:
    """The different prompts of a file, in its order.

    Raises:
        PairsError: it is missing or empty, or a line breaks the format; the message names the line.
    """
    try:
        lines = path.read_bytes().decode().split("\n")
    except OSError as e:
        raise PairsError(f"cannot read prompts {path}: {e.strerror}; check the path") from e
    except UnicodeDecodeError as e:
        raise PairsError(f"prompts {path} are not UTF-8; convert the file") from e
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = _parse(json.loads(line)) if path.suffix == ".jsonl" else Prompt(None, (("user", line.strip()),))
        except ValueError as e:
            raise PairsError(f"{path}, line {number}: {e}; give `prompt` or `messages`") from e
        prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise PairsError(f"{path} holds no prompts; write one a line")
    return list(prompts.values())


def _parse(record: Any) -> Prompt:
    if not isinstance(record, dict):
        raise ValueError(f"a prompt is a JSON object, not {type(record).__name__}")
    if unknown := sorted(set(record) - _FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}")
    raw, messages = record.get("prompt"), record.get("messages", [])
    if (raw is None) == (not messages):
        raise ValueError("give exactly one of `prompt` and `messages`")
    if raw is not None and (not isinstance(raw, str) or not raw.strip()):
        raise ValueError("`prompt` must be a non-empty string")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError("each message has exactly `role` and `content`")
        if not all(isinstance(value, str) for value in message.values()):
            raise ValueError("`role` and `content` are strings")
        turns.append((message["role"], message["content"]))
    return Prompt(raw, tuple(turns))
