"""Completions of prompts, sampled: from an endpoint that speaks the OpenAI API, or from transformers.

Each sample has a seed of its own, made of the run's seed, the prompt and the round, so a run that was interrupted ends with the
samples of one that was not (where the endpoint honours seeds).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import openai

from trimtab.attribution.errors import ModelError, PairsError
from trimtab.attribution.in_flight import in_flight
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.serving import reachable

__all__ = ["Ask", "Sample", "Sampling", "from_endpoint", "from_transformers"]


class Ask(NamedTuple):
    """One sample to take."""

    prompt: Prompt
    round: int

    @property
    def key(self) -> str:
        """Names the sample in a journal."""
        return f"sample/{self.prompt.key}/{self.round}"


class Sample(NamedTuple):
    """One completion of a prompt."""

    text: str
    n_tokens: int
    """Tokens sampled, end of turn included."""
    finished: bool
    """It ended by itself, and not at the limit."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled; no top-k, no top-p."""

    temperature: float
    max_tokens: int
    seed: int
    system: str | None = None
    """A system message before every chat prompt, in place of the template's own."""

    def seed_of(self, ask: Ask) -> int:
        """The seed of one sample."""
        digest = hashlib.sha256(f"{self.seed}/{ask.prompt.key}/{ask.round}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def fields(self, ask: Ask) -> dict[str, Any]:
        """The ask as a request has it."""
        fields = ask.prompt.fields()
        if self.system is not None:
            if ask.prompt.raw is not None:
                raise PairsError(
                    "a raw prompt takes no system message; give `messages`, or leave the system message out"
                )
            fields["messages"] = [{"role": "system", "content": self.system}, *fields["messages"]]
        return fields | {
            "temperature": self.temperature,
            "top_p": 1.0,
            "max_tokens": self.max_tokens,
            "seed": self.seed_of(ask),
        }


def from_endpoint(
    client: openai.OpenAI, model: str, asks: Sequence[Ask], sampling: Sampling, *, n_parallel: int
) -> Iterator[tuple[Ask, Sample]]:
    """Each sample as it is finished, `n_parallel` of them in flight.

    Raises:
        ServingError: the endpoint cannot be reached, or refuses.
    """

    def one(ask: Ask) -> Sample:
        fields = sampling.fields(ask)
        with reachable(str(client.base_url)):
            if ask.prompt.raw is not None:
                text = client.completions.create(model=model, **fields)
                return Sample(text.choices[0].text, _n_tokens(text), text.choices[0].finish_reason == "stop")
            chat = client.chat.completions.create(model=model, **fields)
            choice = chat.choices[0]
            return Sample(choice.message.content or "", _n_tokens(chat), choice.finish_reason == "stop")

    yield from in_flight(asks, one, n_parallel)


def _n_tokens(reply: Any) -> int:
    return int(reply.usage.completion_tokens) if reply.usage is not None else 0


def from_transformers(
    folder: str, asks: Sequence[Ask], sampling: Sampling, *, batch_size: int
) -> Iterator[tuple[Ask, Sample]]:
    """Each sample, batch by batch; a batch is seeded by its first ask, so its samples depend on what is sampled with it.

    Raises:
        ModelError: there is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.attribution.model import compute_device

    device = compute_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device).train(False)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"cannot load model {folder!r}: {str(e).splitlines()[0]}; give an ordinary HF folder or a hub id"
        ) from e
    ends = _ends(model.generation_config.eos_token_id) | _ends(tokenizer.eos_token_id)
    for start in range(0, len(asks), batch_size):
        batch = asks[start : start + batch_size]
        texts = [_templated(tokenizer, sampling.fields(ask)) for ask in batch]
        ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        width = max(map(len, ids))
        seen = [[False] * (width - len(row)) + [True] * len(row) for row in ids]
        padded = [
            [0] * (width - len(row)) + row for row in ids
        ]  # What is not seen may be any token: many models name none.
        torch.manual_seed(sampling.seed_of(batch[0]))
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(seen, device=device).long(),
                **(how if sampling.temperature > 0 else {"do_sample": False}),
                max_new_tokens=sampling.max_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=0,
            )
        for ask, new in zip(batch, out[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(new) if token in ends), None)
            kept = new if end is None else new[: end + 1]
            yield ask, Sample(tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is not None)


def _ends(eos: int | list[int] | None) -> set[int]:
    """The tokens that end a turn; chat models name several."""
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _templated(tokenizer: Any, fields: dict[str, Any]) -> str:
    if "prompt" in fields:
        return f"{tokenizer.bos_token or ''}{fields['prompt']}" if _adds_bos(tokenizer) else str(fields["prompt"])
    return str(tokenizer.apply_chat_template(fields["messages"], tokenize=False, add_generation_prompt=True))


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
