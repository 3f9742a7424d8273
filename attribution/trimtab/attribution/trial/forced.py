"""Log-probability margins through the server: each pair's completions are given, and read under an edit.

A completion that is given stands in the prompt, so the edit's scope is spelt as a window of the prompt: what the edit would touch
while the completion is written, it touches while it is read. Deterministic, and the same number as `validation.Margins` has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.attribution.in_flight import in_flight
from trimtab.attribution.journal import Journal
from trimtab.attribution.pairs import Completion
from trimtab.attribution.trial.endpoint import Endpoint
from trimtab.client import Edit, Steering

__all__ = ["Margins", "Shift", "as_given"]

Array = NDArray[np.float64]


class Shift(NamedTuple):
    """What an edit does to the pairs, one value per prompt; nats per token."""

    margin_P: Array
    """Change of the log-probability margin, positive over negative: below 0 is away from the behaviour."""
    damage_P: Array
    """Change of the negative completions' mean cross-entropy."""


@dataclass(frozen=True)
class Margins:
    """The pairs of a trial, tokenised, with the prompt that each belongs to."""

    journal: Journal
    endpoint: Endpoint
    pairs: Sequence[tuple[Completion, Completion]]
    prompts: Sequence[str]
    n_parallel: int
    advance: Callable[[str, int, int], None]

    def shifts(self, sets: Sequence[tuple[Edit, ...]], what: str = "margins") -> list[Shift]:
        """The shift under each set of edits, all of them in one batch."""
        work = [(edits, c) for edits in ((), *sets) for pair in self.pairs for c in pair]
        missing = [(edits, c) for edits, c in dict.fromkeys(work) if _key(edits, c) not in self.journal]
        done = len(work) - len(missing)
        self.advance(what, done, len(work))
        for (edits, c), nats in in_flight(missing, self._nats, self.n_parallel):
            self.journal.add(_key(edits, c), {"nats": nats})
            self.advance(what, done := done + 1, len(work))
        loss_P2 = self._losses(())
        return [self._shift(self._losses(edits) - loss_P2) for edits in sets]

    def _nats(self, item: tuple[tuple[Edit, ...], Completion]) -> float:
        edits, c = item
        steering = Steering(edits=[as_given(edit, c.n_prompt) for edit in edits]) if edits else None
        return self.endpoint.nats(list(c.ids[: c.n_prompt]), list(c.ids[c.n_prompt :]), steering)

    def _losses(self, edits: tuple[Edit, ...]) -> Array:
        return np.array([[self.journal[_key(edits, c)]["nats"] for c in pair] for pair in self.pairs])

    def _shift(self, change_P2: Array) -> Shift:
        margin, damage = change_P2[:, 1] - change_P2[:, 0], change_P2[:, 1]
        names = list(dict.fromkeys(self.prompts))
        of = np.array([names.index(p) for p in self.prompts])
        return Shift(*(np.array([x[of == i].mean() for i in range(len(names))]) for x in (margin, damage)))


def as_given(edit: Edit, n_prompt: int) -> Edit:
    """The edit as it is asked for when the completion is given in the prompt: position n_prompt − 1 predicts its first token."""
    given = edit.during("prompt", first_token=edit.first_token)
    match edit.tokens:
        case "completion":
            return given.window(n_prompt - 1)
        case "prompt":
            return given.window(None, n_prompt - 1)
        case "all":
            return given


def _key(edits: tuple[Edit, ...], c: Completion) -> str:
    text = json.dumps([[edit.to_dict() for edit in edits], c.ids, c.n_prompt])
    return f"margin/{hashlib.sha256(text.encode()).hexdigest()[:24]}"
