"""Dose and response: what an arm does at a strength, over prompts.

Replies to one prompt are not independent, so each prompt counts once: its mean over seeds, minus its mean without steering. The
interval is Student's over prompts; the p-value is that of a sign flip over prompts, exact up to 16 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trimtab.attribution.trial.cells import Outcome

__all__ = ["Dose", "Estimate", "Limits", "doses", "finite", "sign_flip_p", "strength_range"]

Array = NDArray[np.float64]
N_FLIPS = 20_000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % interval."""

    mean: float
    low: float
    high: float
    se: float

    @classmethod
    def of(cls, values_P: Sequence[float] | Array) -> Estimate:
        """Of one value per prompt; a single prompt has an infinite interval."""
        x_P = np.asarray(values_P, np.float64)
        mean = float(x_P.mean())
        if len(x_P) < 2:
            return cls(mean, -np.inf, np.inf, np.inf)
        se = float(x_P.std(ddof=1) / np.sqrt(len(x_P)))
        half = float(stats.t.ppf(0.975, len(x_P) - 1)) * se
        return cls(mean, mean - half, mean + half, se)


@dataclass(frozen=True)
class Limits:
    """What a strength may cost and still be called safe; each is held against the unsteered replies."""

    nats: float = 0.5
    """Rise of the mean cross-entropy of the replies under the unsteered model, nats per token; on prompts and neutral ones."""
    repetition: float = 0.1
    """Rise of the repeated fraction of runs of three tokens."""
    incoherent: float = 0.1
    """Rise of the fraction of incoherent replies."""


@dataclass(frozen=True)
class Dose:
    """One arm at one strength."""

    arm: str
    latent: int | None
    strength: float
    n_prompts: int
    n_replies: int
    shows: float
    """Fraction of the replies that show the behaviour; incoherent ones do not."""
    lacks: float
    incoherent: float
    effect: Estimate
    """Change of `shows` from unsteered, over prompts: below 0 is away from the behaviour."""
    p: float
    """Sign-flip p-value of the effect, two-sided."""
    nats: Estimate
    """Change of the replies' mean cross-entropy under the unsteered model, nats per token."""
    repetition: float
    """Change of the repeated fraction of runs of three tokens."""
    neutral_changed: float | None
    """Fraction of the neutral prompts whose greedy reply is another."""
    neutral_nats: float | None
    """Change of the mean cross-entropy of the neutral replies under the unsteered model."""
    max_relative_norm: float
    safe: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON; infinities become null."""
        found: dict[str, Any] = finite(asdict(self))
        return found


def doses(outcomes: Sequence[Outcome], limits: Limits) -> list[Dose]:
    """The doses of all arms and strengths, each held against the unsteered outcomes of the same prompts and seeds."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.cell.arm.name, outcome.cell.strength), []).append(outcome)
    unsteered = groups["unsteered", 0.0]
    return [_dose(group, unsteered, limits) for group in groups.values()]


def _dose(group: list[Outcome], unsteered: list[Outcome], limits: Limits) -> Dose:
    own, base = _split(group), _split(unsteered)
    shows_P = _change(own[0], base[0], lambda o: o.verdict == "shows")
    nats_P = _change(own[0], base[0], lambda o: o.nats)
    repetition = float(_change(own[0], base[0], lambda o: o.repetition).mean())
    incoherent = float(_change(own[0], base[0], lambda o: o.verdict == "incoherent").mean())
    texts = {o.cell.prompt.key: o.reply.ids for o in base[1]}
    changed = [o.reply.ids != texts[o.cell.prompt.key] for o in own[1]]
    neutral_nats = float(_change(own[1], base[1], lambda o: o.nats).mean()) if own[1] else None
    nats = Estimate.of(nats_P)
    first = group[0].cell
    return Dose(
        arm=first.arm.name,
        latent=first.arm.latent,
        strength=first.strength,
        n_prompts=len(shows_P),
        n_replies=len(own[0]),
        shows=_mean(own[0], lambda o: o.verdict == "shows"),
        lacks=_mean(own[0], lambda o: o.verdict == "lacks"),
        incoherent=_mean(own[0], lambda o: o.verdict == "incoherent"),
        effect=Estimate.of(shows_P),
        p=sign_flip_p(shows_P),
        nats=nats,
        repetition=repetition,
        neutral_changed=float(np.mean(changed)) if changed else None,
        neutral_nats=neutral_nats,
        max_relative_norm=max(o.reply.max_relative_norm for o in group),
        safe=max(nats.mean, neutral_nats or 0.0) <= limits.nats
        and repetition <= limits.repetition
        and incoherent <= limits.incoherent,
    )


def strength_range(of_one_arm: Sequence[Dose]) -> tuple[float, float] | None:
    """The measured strengths around 0 with only safe ones between them; None where neither neighbour of 0 is safe."""
    ends = []
    for sign in (-1, 1):
        end = 0.0
        for dose in sorted((d for d in of_one_arm if d.strength * sign > 0), key=lambda d: abs(d.strength)):
            if not dose.safe:
                break
            end = dose.strength
        ends.append(end)
    return (ends[0], ends[1]) if ends != [0.0, 0.0] else None


def sign_flip_p(values_P: Sequence[float] | Array, seed: int = 0) -> float:
    """Two-sided p-value of the mean's distance from 0, under random signs of the prompts' values."""
    x_P = np.asarray(values_P, np.float64)
    x_P = x_P[x_P != 0]
    n = len(x_P)
    if n == 0:
        return 1.0
    if n <= 16:
        signs_FP = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs_FP = np.random.default_rng(seed).choice([-1.0, 1.0], size=(N_FLIPS, n))
    sums_F = np.abs(signs_FP @ x_P)
    hits = int((sums_F >= abs(x_P.sum()) - 1e-12).sum())
    return hits / len(sums_F) if n <= 16 else (hits + 1) / (len(sums_F) + 1)


def _split(group: list[Outcome]) -> tuple[list[Outcome], list[Outcome]]:
    return [o for o in group if not o.cell.neutral], [o for o in group if o.cell.neutral]


def _change(own: list[Outcome], base: list[Outcome], value: Any) -> Array:
    """Per prompt: mean of `value` over its replies, minus that of its unsteered replies."""
    own_of, base_of = _by_prompt(own, value), _by_prompt(base, value)
    return np.array([own_of[key] - base_of[key] for key in own_of])


def _by_prompt(outcomes: list[Outcome], value: Any) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.cell.prompt.key, []).append(float(value(outcome)))
    return {key: float(np.mean(values)) for key, values in found.items()}


def _mean(outcomes: list[Outcome], value: Any) -> float:
    return float(np.mean([float(value(o)) for o in outcomes]))


def finite(value: Any) -> Any:
    """A document in which what is not finite, as an interval over one prompt, is None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
