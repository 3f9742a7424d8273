"""Pairs: one prompt with a completion that shows the behaviour (positive) and one that does not (negative).

A pair file is JSONL, one object a line:

    prompt     string       raw text, given to the model as it is      (exactly one of `prompt` and `messages`)
    messages   [{role, content}, …]   chat messages, put through the model's chat template with the generation prompt
    positive   string       completion that shows the behaviour
    negative   string       completion that lacks it
    id         string       optional name of the pair, unique in the file
    metadata   object       optional; carried along, never interpreted

Anything else is an error that names file and line. Pairs are split into train and held-out by *prompt*, so that no prompt is
on both sides, and by hash, so that a pair keeps its side when the file grows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.attribution.errors import PairsError, SelectionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Completion", "Pair", "PairFile", "load_pairs", "shipped_pairs", "split", "tokenise"]

_FIELDS = {"prompt", "messages", "positive", "negative", "id", "metadata"}


@dataclass(frozen=True)
class Pair:
    """One line of a pair file."""

    id: str
    prompt: str | None
    """Raw prompt; None when the prompt is `messages`."""
    messages: tuple[tuple[str, str], ...]
    """(role, content) of each chat message; empty when the prompt is raw."""
    positive: str
    negative: str

    @property
    def prompt_key(self) -> str:
        """What makes two prompts the same prompt: pairs that share it are never split, and are one cluster in statistics."""
        return json.dumps([self.prompt, self.messages], ensure_ascii=False)


@dataclass(frozen=True)
class PairFile:
    """The pairs of one file."""

    pairs: tuple[Pair, ...]
    digest: str
    """`sha256:…` of the file's bytes."""

    @property
    def n_prompts(self) -> int:
        """Distinct prompts."""
        return len({pair.prompt_key for pair in self.pairs})


class Completion(NamedTuple):
    """One tokenised prompt with its completion."""

    ids: tuple[int, ...]
    n_prompt: int
    """The first `n_prompt` ids are the prompt."""

    @property
    def n_completion(self) -> int:
        """Tokens of the completion; as many positions predict them: n_prompt − 1 … len(ids) − 2."""
        return len(self.ids) - self.n_prompt


def shipped_pairs(behaviour: str = "pretends_human") -> Path:
    """The pair file of a behaviour that ships with Trimtab; `pair_sets/README.md` says how it was made."""
    return Path(__file__).parent / "pair_sets" / f"{behaviour}.jsonl"


def load_pairs(path: Path) -> PairFile:
    """Read a pair file.

    Raises:
        PairsError: the file is missing or empty, or a line breaks the format; the message names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise PairsError(f"cannot read pairs {path}: {e.strerror}; check the path") from e
    pairs: list[Pair] = []
    lines: dict[str, int] = {}
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            pair = _parse(json.loads(raw.decode()), f"line-{number}")
        except ValueError as e:
            raise PairsError(
                f"{path}, line {number}: {e}; the fields of a pair are {', '.join(sorted(_FIELDS))}"
            ) from e
        if pair.id in lines:
            raise PairsError(f"{path}, line {number}: id {pair.id!r} is taken by line {lines[pair.id]}; ids are unique")
        lines[pair.id] = number
        pairs.append(pair)
    if not pairs:
        raise PairsError(f"{path} holds no pairs; give JSON lines with prompt or messages, positive and negative")
    return PairFile(tuple(pairs), "sha256:" + hashlib.sha256(data).hexdigest())


def _parse(record: Any, default_id: str) -> Pair:
    if not isinstance(record, dict):
        raise ValueError(f"a pair is a JSON object, not {type(record).__name__}")
    if unknown := sorted(set(record) - _FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError("give exactly one of `prompt` and `messages`")
    for field in ("prompt", "positive", "negative", "id"):
        if field in record and (not isinstance(record[field], str) or not record[field].strip()):
            raise ValueError(f"`{field}` must be a non-empty string")
    for field in ("positive", "negative"):
        if field not in record:
            raise ValueError(f"`{field}` is missing")
    if record["positive"] == record["negative"]:
        raise ValueError("`positive` and `negative` are the same text")
    if not isinstance(record.get("metadata", {}), dict):
        raise ValueError("`metadata` must be an object")
    messages = record.get("messages", [])
    if not isinstance(messages, list) or ("messages" in record and not messages):
        raise ValueError("`messages` must be a non-empty list")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError("each message has exactly `role` and `content`")
        if not all(isinstance(value, str) for value in message.values()):
            raise ValueError("`role` and `content` are strings")
        turns.append((message["role"], message["content"]))
    return Pair(
        id=record.get("id", default_id),
        prompt=record.get("prompt"),
        messages=tuple(turns),
        positive=record["positive"],
        negative=record["negative"],
    )


def split(pairs: tuple[Pair, ...], held_out: float) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): a prompt is held out when its hash falls below the fraction `held_out`.

    Raises:
        SelectionError: one side would be empty.
    """
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        u = int.from_bytes(hashlib.sha256(pair.prompt_key.encode()).digest()[:8], "big") / 2**64
        sides[u < held_out].append(pair)
    if not all(sides):
        n_prompts = len({pair.prompt_key for pair in pairs})
        raise SelectionError(
            f"{n_prompts} prompts cannot be split into train and held-out at {held_out:g}; give pairs over more prompts"
        )
    return sides


def tokenise(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[Completion, Completion]:
    """(positive, negative) as token ids; both start with exactly the ids that a server makes of the prompt.

    Raises:
        PairsError: the model has no chat template, or a text has no tokens.
    """
    if pair.messages:
        if tokenizer.chat_template is None:
            raise PairsError(f"pair {pair.id!r} has `messages` but the tokenizer has no chat template; give `prompt`")
        turns = [{"role": role, "content": content} for role, content in pair.messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        special = False  # The template wrote them.
    else:
        text, special = pair.prompt or "", True

    def ids_of(string: str, add_special_tokens: bool) -> list[int]:
        return list(tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    prompt = ids_of(str(text), special)
    completions = []
    for kind, completion in (("positive", pair.positive), ("negative", pair.negative)):
        whole = ids_of(str(text) + completion, special)
        tail = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            # The last prompt token would merge with the completion; a server tokenises the prompt alone, so that is what counts.
            tail = ids_of(completion, False)
        if not prompt or not tail:
            raise PairsError(
                f"pair {pair.id!r} has no tokens in its {'prompt' if not prompt else kind}; give it some text"
            )
        completions.append(Completion((*prompt, *tail), len(prompt)))
    return completions[0], completions[1]
