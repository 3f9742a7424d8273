"""What a server does under load, steered and not, in turns: `trimtab bench`."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from trimtab.client.aio import AsyncTrimtab
from trimtab.client.spec import Steering

__all__ = ["Load", "Round", "measure"]


@dataclass(frozen=True)
class Load:
    """What is asked of a server at once."""

    model: str
    n_streams: int
    n_tokens: int
    n_prompt_words: int


@dataclass(frozen=True)
class Round:
    """What it took, seconds."""

    seconds: float
    """From the first request to the last token of all."""
    first: tuple[float, ...]
    """To the first token, by stream."""
    n_tokens: int
    """Of all streams, as the server counted them."""

    @property
    def tokens_per_second(self) -> float:
        """Of all streams together."""
        return self.n_tokens / self.seconds

    @property
    def median_first(self) -> float:
        """Median time to the first token."""
        return statistics.median(self.first)


async def measure(
    client: AsyncTrimtab, load: Load, steerings: Sequence[Steering | None], n_rounds: int
) -> list[list[Round]]:
    """The rounds of each steering, after one that is not counted; every other round runs in the opposite order.

    Raises:
        NotAppliedError: a steered reply without proof.
    """
    found: list[list[Round]] = [[] for _ in steerings]
    for k in range(-1, n_rounds):
        order = list(enumerate(steerings))
        for i, steering in order if k % 2 == 0 else order[::-1]:
            took = await _round(client, load, steering)
            if k >= 0:
                found[i].append(took)
    return found


async def _round(client: AsyncTrimtab, load: Load, steering: Steering | None) -> Round:
    start = time.perf_counter()
    streams = await asyncio.gather(*(_stream(client, load, steering, start) for _ in range(load.n_streams)))
    seconds = time.perf_counter() - start
    return Round(seconds, tuple(first for first, _ in streams), sum(n for _, n in streams))


async def _stream(client: AsyncTrimtab, load: Load, steering: Steering | None, start: float) -> tuple[float, int]:
    """When its first token came, and how many there were."""
    prompt = " ".join(token_hex(2) for _ in range(load.n_prompt_words))  # that no prefix cache holds
    first: float | None = None
    n_tokens = 0
    options: Any = {"include_usage": True}
    async with await client.completions.create(
        model=load.model,
        prompt=prompt,
        max_tokens=load.n_tokens,
        stream=True,
        stream_options=options,
        steering=steering,
        extra_body={"ignore_eos": True},
    ) as chunks:
        async for chunk in chunks:
            if first is None:
                first = time.perf_counter() - start
            if chunk.usage is not None:
                n_tokens = chunk.usage.completion_tokens
    return (time.perf_counter() - start if first is None else first), n_tokens
