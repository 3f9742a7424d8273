"""The model's own replies: what it is served for, so the best data there is.

Prompts are real questions and composed everyday wishes; replies are sampled at temperatures 0.8-1.0. vLLM generates when it
is installed (1.5 times as fast here), else transformers. Parts of `_PART` prompts are JSON-lines files; a stopped run goes
on with the next part.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from trimtab.attribution.training.corpus import Message, as_typed, some_system_prompt
from trimtab.attribution.training.sources import rows

__all__ = ["prompts", "sample"]

_PART = 96
_SHARES = {"NQ-open": 420, "TruthfulQA": 320, "HealthSearchQA": 260, "PIQA": 220, "MMLU": 100}

_TOPICS = (
    "autumn", "a lost dog", "the sea", "my grandmother", "a robot who learns to cook", "climate change", "space travel",
    "learning to swim", "a noisy neighbour", "working from home", "a broken friendship", "the first day at school",
    "artificial intelligence", "money", "a haunted lighthouse", "coffee", "getting older", "a difficult boss", "football",
    "city life", "loneliness", "gratitude", "the moon", "a small bakery", "public transport", "vegetarian food",
    "social media", "a rainy Sunday", "a job interview", "moving abroad", "my cat", "sleep", "a time machine", "honesty",
)  # fmt: skip
_WISHES = (
    "Write a short poem about {}.", "Tell me a short story about {}.", "Write a joke about {}.",
    "What is your opinion on {}?", "Give me five tips about {}.", "Write an email to a friend about {}.",
    "I feel sad about {}. What should I do?", "Explain {} to a five-year-old.", "Argue for and against {}.",
    "Write an angry complaint about {}.", "Do you like {}? Be honest.", "Make a list of facts about {}.",
    "Write a dialogue between two people who disagree about {}.", "Summarise what people say about {}.",
    "I'm really excited about {}!!", "Translate 'I often think about {}' into French.",
)  # fmt: skip
_EVERYDAY = (
    "How do I boil an egg?", "What should I cook tonight with rice and eggs?", "Plan a weekend in Rome for me.",
    "My laptop is slow. What can I do?", "How do I ask my boss for a raise?", "Write a birthday wish for my sister.",
    "I can't sleep. Any advice?", "Who are you?", "What can you do?", "Are you a human?", "Do you have feelings?",
    "What is 17 times 6?", "Solve 3x + 5 = 20.", "Write a Python function that reverses a string.",
    "What is the difference between a list and a tuple in Python?", "Fix my grammar: he go to school yesterday.",
    "Give me a workout plan for beginners.", "How can I save money on groceries?", "What's a good name for a black cat?",
    "Recommend me a book.", "I had a fight with my best friend.", "I hate my job.", "I'm so happy today!",
    "You are wrong, the earth is flat.", "I think 2 + 2 is 5. Do you agree?", "Thank you so much!", "hello",
    "Write a cover letter for a waiter position.", "Write a product description for a water bottle.",
    "How do vaccines work?", "Why is the sky blue?", "What happened in 1969?", "Tell me something surprising.",
    "What should I say at a funeral?", "How do I tie a tie?", "Convert 10 miles to kilometres.", "Who won the world cup?",
    "My order has not arrived and I want a refund.", "Is it ok to lie sometimes?", "How do I remove a coffee stain?",
)  # fmt: skip


def prompts(wheel: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """The first `n` openings of one shuffled list: `group` (the question as in its source) and `messages`."""
    rng = random.Random(seed)
    asked = []
    for name, share in _SHARES.items():
        questions = sorted({row["question"] for row in rows(wheel, name) if 12 < len(row["question"]) < 200})
        asked += rng.sample(questions, share)
    made = [wish.format(topic) for wish in _WISHES for topic in _TOPICS]
    rng.shuffle(made)
    openings = [(question, as_typed(question, rng)) for question in asked]
    openings += [(wish, wish) for wish in (*_EVERYDAY, *made)]
    rng.shuffle(openings)
    return [
        {"group": group, "messages": [*some_system_prompt(rng), {"role": "user", "content": text}]}
        for group, text in openings[:n]
    ]


def sample(
    openings: list[dict[str, Any]], folder: Path, model_folder: str, max_new_tokens: int, seed: int
) -> Iterator[int]:
    """Fill `folder` with part files; yields the number of parts there after each."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [openings[start : start + _PART] for start in range(0, len(openings), _PART)]
    generate: Callable[[list[list[Message]], int], list[str]] | None = None
    with FileLock(folder / ".lock"):
        for i, part in enumerate(parts):
            path = folder / f"part-{i:03d}.jsonl"
            if not path.exists():
                generate = generate or _generator(model_folder, max_new_tokens)
                replies = generate([opening["messages"] for opening in part], seed + i)
                lines = (
                    {**opening, "messages": [*opening["messages"], {"role": "assistant", "content": reply.strip()}]}
                    for opening, reply in zip(part, replies, strict=True)
                )
                partial = path.with_suffix(".part")
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
                partial.rename(path)
            yield i + 1


def _temperature(seed: int) -> float:
    return (0.8, 0.9, 1.0)[seed % 3]


def _generator(model_folder: str, max_new_tokens: int) -> Callable[[list[list[Message]], int], list[str]]:
    if importlib.util.find_spec("vllm"):
        return _vllm(model_folder, max_new_tokens)
    return _transformers(model_folder, max_new_tokens)


def _vllm(model_folder: str, max_new_tokens: int) -> Callable[[list[list[Message]], int], list[str]]:
    from vllm import LLM, SamplingParams

    engine = LLM(model_folder, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=_PART)

    def generate(conversations: list[list[Message]], seed: int) -> list[str]:
        params = SamplingParams(temperature=_temperature(seed), max_tokens=max_new_tokens, seed=seed)
        chats: list[Any] = list(conversations)
        outputs = engine.chat(chats, params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    return generate


def _transformers(model_folder: str, max_new_tokens: int) -> Callable[[list[list[Message]], int], list[str]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)

    def generate(conversations: list[list[Message]], seed: int) -> list[str]:
        torch.manual_seed(seed)
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=_temperature(seed), top_k=0
        )
        return list(tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True))

    return generate
