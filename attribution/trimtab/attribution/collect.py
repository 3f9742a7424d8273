"""Pairs from a model's own samples: each prompt is sampled many times, the completions are graded, and prompts that got both
kinds become pairs.

Measure before you choose: a behaviour that shows in fewer than 15 % of the samples, or is missing in fewer, gives few pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.attribution.graders import Grade, Grader, Verdict, coherent
from trimtab.attribution.in_flight import in_flight
from trimtab.attribution.journal import Journal
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.sampling import Ask, Sample

__all__ = ["MIN_RATE", "Collected", "Graded", "Sampler", "choose_pairs", "collect"]

MIN_RATE = 0.15
"""Of either kind; below it, pairs are few."""

Sampler = Callable[[Sequence[Ask]], Iterator[tuple[Ask, Sample]]]


@dataclass(frozen=True)
class Graded:
    """A sample with its grade; None where it is incoherent, which is graded no further."""

    prompt: Prompt
    sample: Sample
    grade: Grade | None

    @property
    def verdict(self) -> Verdict | None:
        """None where the text is incoherent."""
        return None if self.grade is None else self.grade.verdict


@dataclass(frozen=True)
class Collected:
    """All samples of a run."""

    graded: tuple[Graded, ...]
    usd: float | None
    """What a judge charged, where it gave prices."""

    @property
    def rates(self) -> dict[str, float]:
        """Fraction of the samples that show the behaviour, lack it, are unclear, or are incoherent."""
        counts = Counter(g.verdict or "incoherent" for g in self.graded)
        return {kind: counts[kind] / len(self.graded) for kind in ("shows", "lacks", "unclear", "incoherent")}

    @property
    def n_unread(self) -> int:
        """Verdicts that a judge did not give, whatever the completion."""
        reasons = (g.grade.reason or "" for g in self.graded if g.grade is not None)
        return sum(reason.startswith("no verdict") for reason in reasons)


def collect(
    journal: Journal,
    prompts: Sequence[Prompt],
    grader: Grader,
    sampler: Sampler,
    *,
    rounds: int,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Collected:
    """Sample and grade what the journal lacks; `advance(what, done, total)` tells how far it is."""
    asks = [Ask(prompt, i) for i in range(rounds) for prompt in prompts]
    missing = [ask for ask in asks if ask.key not in journal]
    done = len(asks) - len(missing)
    advance("sampling", done, len(asks))
    for ask, sample in sampler(missing) if missing else ():
        journal.add(ask.key, sample._asdict())
        advance("sampling", done := done + 1, len(asks))
    samples = {ask: Sample(**journal[ask.key]) for ask in asks}
    ungraded = [ask for ask in asks if coherent(samples[ask].text) and _grade_key(grader, ask) not in journal]
    done = len(asks) - len(ungraded)
    advance("grading", done, len(asks))
    grades = in_flight(ungraded, lambda ask: grader.grade(ask.prompt.text, samples[ask].text), grader.n_parallel)
    for ask, grade in grades:
        journal.add(_grade_key(grader, ask), grade.to_dict())
        advance("grading", done := done + 1, len(asks))
    graded = tuple(Graded(ask.prompt, samples[ask], _kept(journal, _grade_key(grader, ask))) for ask in asks)
    all_grades = [g.grade for g in graded if g.grade is not None]
    return Collected(
        graded, grader.usd(sum(g.input_tokens for g in all_grades), sum(g.output_tokens for g in all_grades))
    )


def choose_pairs(graded: Sequence[Graded], *, per_prompt: int, min_tokens: int) -> list[dict[str, Any]]:
    """Records of a pair file: for each prompt the completions of the two kinds that are closest in length, each used once."""
    records: list[dict[str, Any]] = []
    by_prompt: dict[str, list[Graded]] = {}
    for g in graded:
        if g.sample.n_tokens >= min_tokens:
            by_prompt.setdefault(g.prompt.key, []).append(g)
    taken: Counter[str] = Counter()
    for group in by_prompt.values():
        shows, lacks = (
            list({g.sample.text: g for g in group if g.verdict == kind}.values()) for kind in ("shows", "lacks")
        )
        slug = re.sub(r"[^a-z0-9]+", "-", group[0].prompt.text.lower()).strip("-")[:60]
        for _ in range(min(per_prompt, len(shows), len(lacks))):
            positive, negative = min(
                ((p, n) for p in shows for n in lacks),
                key=lambda pair: abs(pair[0].sample.n_tokens - pair[1].sample.n_tokens),
            )
            shows.remove(positive)
            lacks.remove(negative)
            records.append(
                {
                    "id": f"{slug}.{taken[slug]}",
                    **group[0].prompt.fields(),
                    "positive": positive.sample.text,
                    "negative": negative.sample.text,
                }
            )
            taken[slug] += 1
    return records


def _grade_key(grader: Grader, ask: Ask) -> str:
    return f"grade/{grader.digest[-12:]}/{ask.prompt.key}/{ask.round}"


def _kept(journal: Journal, key: str) -> Grade | None:
    return Grade.from_dict(journal[key]) if key in journal else None
