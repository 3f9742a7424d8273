"""Which few edits to recommend: greedy forward selection on held-out pairs, corrected for how much was tried.

A candidate takes part if its own effect is away from the behaviour and survives Benjamini and Hochberg over all candidates. Then
the one that adds most is added, as long as what it adds is more than chance (a sign flip over prompts, times the number of
candidates that were tried for the place), and the honest completions stay likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control

from trimtab.attribution.trial.doses import Estimate, sign_flip_p
from trimtab.attribution.trial.forced import Shift

__all__ = ["Candidate", "Choice", "Step", "choose"]

ALPHA = 0.05


@dataclass(frozen=True)
class Candidate:
    """One latent alone, on the held-out pairs."""

    latent: int
    margin: Estimate
    """Change of the margin, nats per token; below 0 is away from the behaviour."""
    damage: Estimate
    """Change of the negative completions' mean cross-entropy, nats per token."""
    p: float
    q: float
    """p, corrected for all candidates."""

    @property
    def takes_part(self) -> bool:
        """Whether its own effect is away from the behaviour, and no chance."""
        return self.margin.mean < 0 and self.q <= ALPHA


@dataclass(frozen=True)
class Step:
    """One latent that was added."""

    latent: int
    margin: Estimate
    """Of all that is chosen by then."""
    damage: Estimate
    gain: Estimate
    """Change of the margin that this one adds."""
    p: float
    """Of the gain, times the number of candidates tried for the place."""


@dataclass(frozen=True)
class Choice:
    """The candidates and the steps."""

    candidates: tuple[Candidate, ...]
    steps: tuple[Step, ...]
    ended: str
    """Why it ended, for people."""

    @property
    def latents(self) -> tuple[int, ...]:
        """What is recommended, in the order of the steps."""
        return tuple(step.latent for step in self.steps)


def choose(
    latents: Sequence[int],
    shifts: Callable[[Sequence[tuple[int, ...]]], Sequence[Shift]],
    *,
    max_size: int,
    max_damage: float,
) -> Choice:
    """Forward selection; `shifts` measures sets of latents."""
    alone = shifts([(latent,) for latent in latents])
    p = [sign_flip_p(shift.margin_P) for shift in alone]
    q = false_discovery_control(p) if p else []
    candidates = [
        Candidate(latent, Estimate.of(s.margin_P), Estimate.of(s.damage_P), p_one, float(q_one))
        for latent, s, p_one, q_one in zip(latents, alone, p, q, strict=True)
    ]
    open_ = [c.latent for c in candidates if c.takes_part]
    chosen: tuple[int, ...] = ()
    margin_P = np.zeros_like(alone[0].margin_P) if alone else np.zeros(0)
    steps: list[Step] = []
    ended = "every candidate that takes part is chosen" if open_ else "no candidate has an effect of its own"
    while open_ and len(chosen) < max_size:
        tried = shifts([(*chosen, latent) for latent in open_])
        able = [(s, latent) for s, latent in zip(tried, open_, strict=True) if s.damage_P.mean() <= max_damage]
        if not able:
            ended = f"any further edit costs the honest completions more than {max_damage:g} nats per token"
            break
        shift, latent = min(able, key=lambda pair: float(pair[0].margin_P.mean()))
        gain_P = shift.margin_P - margin_P
        p_gain = min(1.0, sign_flip_p(gain_P) * len(open_))
        if gain_P.mean() >= 0 or p_gain > ALPHA:
            ended = f"no further edit adds more than chance (best: latent {latent}, p = {p_gain:.2g})"
            break
        chosen, margin_P = (*chosen, latent), shift.margin_P
        open_.remove(latent)
        steps.append(
            Step(latent, Estimate.of(shift.margin_P), Estimate.of(shift.damage_P), Estimate.of(gain_P), p_gain)
        )
        if len(chosen) == max_size:
            ended = f"{max_size} edits are the most that were asked for"
    return Choice(tuple(candidates), tuple(steps), ended)
