"""The cells of a trial: one reply each, under one arm at one strength, to one prompt with one seed.

All that are missing go to the server at once, prompt by prompt: an edit of the completion alone leaves the prompt's cache blocks
as they are for everybody, so all arms and strengths of a prompt share one prefill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trimtab.attribution.graders import Grade, Grader, coherent
from trimtab.attribution.in_flight import in_flight
from trimtab.attribution.journal import Journal
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.trial.arms import Arm
from trimtab.attribution.trial.endpoint import Endpoint, Reply

__all__ = ["Cell", "Outcome", "Sampled", "run_cells", "sample_cells", "verdicts"]

Advance = Callable[[str, int, int], None]


class Cell(NamedTuple):
    """One reply to ask for."""

    arm: Arm
    strength: float
    """0 for arms without edits."""
    prompt: Prompt
    seed: int
    neutral: bool
    """Asked greedily, and not graded: it tells side effects."""

    @property
    def key(self) -> str:
        """Names the cell in a journal."""
        kind = "neutral" if self.neutral else "text"
        return f"{kind}/{self.arm.name}/{self.strength:g}/{self.prompt.key}/{self.seed}"


@dataclass(frozen=True)
class Sampled:
    """How replies are sampled."""

    temperature: float
    max_tokens: int

    def request(self, cell: Cell) -> dict[str, Any]:
        """The cell as a request, without its steering. All arms share a prompt's seed."""
        fields = cell.prompt.fields()
        if cell.arm.system is not None:
            if "messages" in fields:
                fields["messages"] = [{"role": "system", "content": cell.arm.system}, *fields["messages"]]
            else:
                fields["prompt"] = f"{cell.arm.system}\n\n{fields['prompt']}"
        digest = hashlib.sha256(f"{cell.seed}/{cell.prompt.key}".encode()).digest()
        sampled = {"temperature": self.temperature, "seed": int.from_bytes(digest[:4], "big") >> 1}
        return (
            fields | ({"temperature": 0.0} if cell.neutral else sampled) | {"max_tokens": self.max_tokens, "top_p": 1.0}
        )


class Outcome(NamedTuple):
    """What came of a cell."""

    cell: Cell
    reply: Reply
    grade: Grade | None
    """None where the text is incoherent, which is graded no further, and for neutral prompts."""
    nats: float
    """Mean cross-entropy of the reply under the unsteered model, nats per token."""

    @property
    def verdict(self) -> str:
        """`shows`, `lacks`, `unclear`, or `incoherent`."""
        return "incoherent" if self.grade is None else self.grade.verdict

    @property
    def repetition(self) -> float:
        """1 − distinct / all runs of three tokens; 0 in text that never repeats itself."""
        ids = self.reply.ids
        runs = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0


def sample_cells(
    journal: Journal,
    endpoint: Endpoint,
    cells: Sequence[Cell],
    sampled: Sampled,
    grader: Grader,
    *,
    n_parallel: int,
    advance: Advance,
) -> dict[str, Reply]:
    """The reply of every cell, by key, graded; only what the journal lacks is asked for."""

    def ask(cell: Cell) -> Reply:
        return endpoint.reply(sampled.request(cell), cell.arm.steering(cell.strength))

    _fill(journal, "replies", cells, lambda c: c.key, lambda c: ask(c)._asdict(), n_parallel, advance)
    replies = {cell.key: Reply(**journal[cell.key]) for cell in cells}

    def graded(cell: Cell) -> dict[str, Any]:
        return grader.grade(cell.prompt.text, replies[cell.key].text).to_dict()

    to_grade = [cell for cell in cells if not cell.neutral and coherent(replies[cell.key].text)]
    _fill(journal, "grades", to_grade, lambda c: _grade_key(grader, c), graded, grader.n_parallel, advance)
    return replies


def run_cells(
    journal: Journal,
    endpoint: Endpoint,
    cells: Sequence[Cell],
    sampled: Sampled,
    grader: Grader,
    *,
    n_parallel: int,
    advance: Advance,
) -> list[Outcome]:
    """The outcome of every cell; only what the journal lacks is asked for."""
    replies = sample_cells(journal, endpoint, cells, sampled, grader, n_parallel=n_parallel, advance=advance)

    def read(cell: Cell) -> dict[str, Any]:
        reply = replies[cell.key]
        return {"nats": endpoint.nats(reply.prompt_ids, reply.ids) if reply.ids else 0.0}

    _fill(journal, "likelihoods", cells, _nats_key, read, n_parallel, advance)
    return [
        Outcome(
            cell,
            replies[cell.key],
            Grade.from_dict(journal[key]) if (key := _grade_key(grader, cell)) in journal else None,
            journal[_nats_key(cell)]["nats"],
        )
        for cell in cells
    ]


def verdicts(journal: Journal, cells: Sequence[Cell], grader: Grader) -> Iterator[tuple[Cell, str]]:
    """What the grader said of each reply that the journal holds; `incoherent` where it was not asked."""
    for cell in (cell for cell in cells if cell.key in journal):
        if _grade_key(grader, cell) in journal:
            yield cell, Grade.from_dict(journal[_grade_key(grader, cell)]).verdict
        elif not coherent(journal[cell.key]["text"]):
            yield cell, "incoherent"


def _fill(
    journal: Journal,
    what: str,
    cells: Sequence[Cell],
    key: Callable[[Cell], str],
    make: Callable[[Cell], dict[str, Any]],
    n_parallel: int,
    advance: Advance,
) -> None:
    missing = sorted((c for c in cells if key(c) not in journal), key=lambda c: c.prompt.key)
    done = len(cells) - len(missing)
    advance(what, done, len(cells))
    for cell, record in in_flight(missing, make, n_parallel):
        journal.add(key(cell), record)
        advance(what, done := done + 1, len(cells))


def _grade_key(grader: Grader, cell: Cell) -> str:
    return f"grade/{grader.digest[-12:]}/{cell.key}"


def _nats_key(cell: Cell) -> str:
    return f"nats/{cell.key}"
