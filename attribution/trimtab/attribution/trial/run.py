"""A trial from its questions to its result; every reply, grade and likelihood goes to the journal as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from scipy.stats import false_discovery_control

from trimtab.attribution.bundle import Bundle, now
from trimtab.attribution.graders import Grader
from trimtab.attribution.journal import Journal
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.trial.arms import UNSTEERED, Arm, arms_of, chosen_arm
from trimtab.attribution.trial.cells import Cell, Outcome, Sampled, run_cells
from trimtab.attribution.trial.choice import Choice, choose
from trimtab.attribution.trial.doses import Dose, Estimate, Limits, doses, finite, strength_range
from trimtab.attribution.trial.endpoint import Endpoint
from trimtab.attribution.trial.forced import Margins, Shift

if TYPE_CHECKING:
    from trimtab.attribution.pairs import Completion

__all__ = ["Result", "Trial", "run"]

N_EXAMPLES = 3
"""Prompts whose replies a result shows."""


@dataclass(frozen=True)
class Trial:
    """What a trial is asked for."""

    bundle: Bundle
    rivals: tuple[Bundle, ...]
    prompts: tuple[Prompt, ...]
    neutral: tuple[Prompt, ...]
    pairs: tuple[tuple[Completion, Completion], ...]
    """Held-out pairs, tokenised; none: no margins, and no choice."""
    pair_prompts: tuple[str, ...]
    """The prompt that each pair belongs to."""
    strengths: tuple[float, ...]
    n_seeds: int
    sampled: Sampled
    system: str | None
    limits: Limits
    max_edits: int
    n_parallel: int

    def journal_of(self, model: str) -> dict[str, Any]:
        """All that changes what a record of the journal means."""
        return {
            "bundle": self.bundle.content_hash,
            "rivals": [rival.content_hash for rival in self.rivals],
            "model": model,
            "system": self.system,
            **asdict(self.sampled),
        }


@dataclass(frozen=True)
class Result:
    """What came of it."""

    trial: Trial
    doses: tuple[Dose, ...]
    q: tuple[float, ...]
    """The doses' p-values, corrected for all of them."""
    margins: dict[str, Shift]
    """By arm, at strength 1; empty without pairs."""
    choice: Choice | None
    outcomes: tuple[Outcome, ...]

    def range_of(self, arm: str) -> tuple[float, float] | None:
        """The safe strengths of an arm."""
        return strength_range([dose for dose in self.doses if dose.arm == arm])

    def document(self, asked: dict[str, Any], usd: float | None) -> dict[str, Any]:
        """The result as JSON; `asked` is how a person asked for it."""
        header = self.trial.bundle.header
        doses_ = [dose.to_dict() | {"q": q} for dose, q in zip(self.doses, self.q, strict=True)]
        return {
            "format": "trimtab.trial",
            "version": 1,
            "created": now(),
            "bundle": {
                "name": header.name,
                "behaviour": header.behaviour,
                "content_hash": self.trial.bundle.content_hash,
            },
            "asked": asked,
            "limits": asdict(self.trial.limits),
            "counts": {
                "replies": len(self.outcomes),
                "reply_tokens": sum(len(o.reply.ids) for o in self.outcomes),
                "prompt_tokens": sum(len(o.reply.prompt_ids) for o in self.outcomes),
                "cached_prompt_tokens": sum(o.reply.cached_tokens for o in self.outcomes),
                "usd": usd,
            },
            "doses": doses_,
            "ranges": {name: self.range_of(name) for name in dict.fromkeys(dose.arm for dose in self.doses)},
            "margins": {
                name: finite({"margin": asdict(Estimate.of(s.margin_P)), "damage": asdict(Estimate.of(s.damage_P))})
                for name, s in self.margins.items()
            },
            "choice": None if self.choice is None else finite(asdict(self.choice)) | {"latents": self.choice.latents},
            "examples": self._examples(),
            "failed": self._failed(),
        }

    def _examples(self) -> list[dict[str, Any]]:
        keys = [prompt.key for prompt in self.trial.prompts[:N_EXAMPLES]]
        return [
            {
                "arm": o.cell.arm.name,
                "strength": o.cell.strength,
                "prompt": o.cell.prompt.text,
                "reply": o.reply.text,
                "verdict": o.verdict,
            }
            for o in self.outcomes
            if o.cell.prompt.key in keys and o.cell.seed == 0 and not o.cell.neutral
        ]

    def _failed(self) -> list[str]:
        """What a reader should know before believing the rest."""
        failed = []
        unread = sum((o.grade.reason or "").startswith("no verdict") for o in self.outcomes if o.grade is not None)
        if unread:
            failed.append(f"The judge gave no verdict on {unread} replies; they count as unclear.")
        base = next(dose for dose in self.doses if dose.arm == UNSTEERED.name)
        if not 0.1 <= base.shows <= 0.9:
            failed.append(
                f"Unsteered, {base.shows:.0%} of the replies show the behaviour: there is little room to move in one direction."
            )
        arms = dict.fromkeys(dose.arm for dose in self.doses if dose.strength)
        if unsafe := [name for name in arms if self.range_of(name) is None]:
            failed.append(f"At no strength that was tried safe: {', '.join(unsafe)}.")
        if self.choice is not None and not self.choice.steps:
            failed.append(f"Nothing was chosen: {self.choice.ended}.")
        return failed


def run(
    trial: Trial,
    journal: Journal,
    endpoint: Endpoint,
    grader: Grader,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Result:
    """Run what the journal lacks, and compute the result.

    Raises:
        ServingError, GraderError, JournalError: it cannot go on; what the journal holds stays.
    """
    arms = arms_of(trial.bundle, trial.rivals, trial.system)
    shifts: dict[str, Shift] = {}
    choice: Choice | None = None
    if trial.pairs:
        margins = Margins(journal, endpoint, trial.pairs, trial.pair_prompts, trial.n_parallel, advance)
        steered = [arm for arm in arms if arm.edits]
        shifts = dict(zip((a.name for a in steered), margins.shifts([a.edits for a in steered]), strict=True))
        candidates = [arm.latent for arm in arms if arm.latent is not None]

        def measure(sets: Sequence[tuple[int, ...]]) -> list[Shift]:
            return margins.shifts([chosen_arm(arms, latents).edits for latents in sets], "choice")

        choice = choose(candidates, measure, max_size=trial.max_edits, max_damage=trial.limits.nats)
        if len(choice.latents) > 1:
            chosen = chosen_arm(arms, choice.latents)
            arms.append(chosen)
            shifts[chosen.name] = margins.shifts([chosen.edits])[0]
    outcomes = run_cells(
        journal,
        endpoint,
        _cells(trial, arms),
        trial.sampled,
        grader,
        n_parallel=trial.n_parallel,
        advance=advance,
    )
    found = doses(outcomes, trial.limits)
    q = false_discovery_control([dose.p for dose in found])
    return Result(trial, tuple(found), tuple(map(float, q)), shifts, choice, tuple(outcomes))


def _cells(trial: Trial, arms: Sequence[Arm]) -> list[Cell]:
    return [
        cell
        for arm in arms
        for strength in (trial.strengths if arm.has_strength else (0.0,))
        for cell in (
            *(Cell(arm, strength, prompt, seed, False) for prompt in trial.prompts for seed in range(trial.n_seeds)),
            *(Cell(arm, strength, prompt, 0, True) for prompt in trial.neutral),
        )
    ]
