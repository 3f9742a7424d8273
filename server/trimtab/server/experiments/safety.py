"""What the server does with an experiment by itself: roll it back, stop it, ramp it up, or nothing, and why. Pure.

Rolled back, at any look: the engine applied something else than what was asked for, even once; an arm's share of failed requests
is credibly above `max_error_rate`; a guardrail is breached; the units are not split as they should be.

Stopped: what its stop rule says has come, and the rule is `automatic`.

Ramped up: the next step of the schedule, once its hold is over, its units have been exposed, somebody has approved it where that
is asked for, and nothing is wrong. A clock that steps back makes a hold longer, never shorter.

Credibly above, at every look: the e-value of k failures in n requests against any rate up to p₀ is the mean over p ~ U(p₀, 1) of
pᵏ(1 − p)ⁿ⁻ᵏ / p₀ᵏ(1 − p₀)ⁿ⁻ᵏ, which is ≥ 1/α with probability α at most, ever (Ville's inequality).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import betaincc, betaln

from trimtab.server.experiments.analysis import SAMPLE_RATIO_ALPHA, Results
from trimtab.server.experiments.exposures import DROPPED
from trimtab.server.experiments.lifecycle import Record
from trimtab.server.experiments.measurements import ArmCounts

__all__ = ["ERROR_ALPHA", "Advice", "Next", "advise", "error_e_value", "next_step", "problems"]

ERROR_ALPHA = 0.001
"""Per arm: a rollback for errors that are none should be rare."""
Waits = Literal["hold", "units", "approval", "health", "paused"]


class Next(NamedTuple):
    """The next step of the ramp schedule, and what it waits for."""

    coverage: float
    at: datetime
    """When its hold is over."""
    min_units: int
    waits_for: tuple[Waits, ...]


@dataclass(frozen=True)
class Advice:
    """What to do now."""

    action: Literal["rollback", "stop", "advance"] | None
    reason: str


def advise(
    record: Record, results: Results, arms: Sequence[ArmCounts], tallies: Mapping[str, int], now: datetime
) -> Advice:
    """What to do with an experiment that runs."""
    if record.state not in ("running", "paused"):
        return Advice(None, "")
    if why := _harm(record, results, arms):
        return Advice("rollback", "; ".join(why))
    if record.definition.stop.automatic and results.over is not None:
        return Advice("stop", f"the stop rule: {_over(record, results)}")
    step = next_step(record, results, tallies, now)
    if step is not None and not step.waits_for:
        return Advice("advance", f"the ramp schedule: coverage {record.coverage:g} → {step.coverage:g}")
    return Advice(None, "")


def problems(
    record: Record, results: Results, arms: Sequence[ArmCounts], tallies: Mapping[str, int]
) -> tuple[str, ...]:
    """What is wrong with an experiment; nothing of a healthy one."""
    found = _harm(record, results, arms)
    if lost := tallies.get(DROPPED, 0):
        found.append(f"{lost} exposures were lost: what was measured is not whole")
    return tuple(found)


def next_step(record: Record, results: Results, tallies: Mapping[str, int], now: datetime) -> Next | None:
    """The next step of the schedule; None once it is over, or has been left."""
    ramp = record.definition.ramp
    if record.step is None or record.step + 1 >= len(ramp) or record.state not in ("running", "paused"):
        return None
    here, there = ramp[record.step], ramp[record.step + 1]
    at = record.covered_since + timedelta(hours=here.hold_hours)
    waits: list[Waits] = []
    if now < at:
        waits.append("hold")
    if sum(results.n_units) < here.min_units:
        waits.append("units")
    if there.approval and record.approved <= record.step:
        waits.append("approval")
    if tallies.get(DROPPED):
        waits.append("health")
    if record.state == "paused":
        waits.append("paused")
    return Next(there.coverage, at, here.min_units, tuple(waits))


def error_e_value(failed: int, n: int, rate: float) -> float:
    """The evidence that more than `rate` of an arm's requests fail."""
    if rate >= 1 or not n:
        return 1.0
    if rate <= 0:
        return np.inf if failed else 1.0
    inside = betaincc(failed + 1, n - failed + 1, rate)
    with np.errstate(divide="ignore"):
        log_mean = betaln(failed + 1, n - failed + 1) + np.log(inside) - np.log1p(-rate)
    return float(np.exp(np.minimum(log_mean - failed * np.log(rate) - (n - failed) * np.log1p(-rate), 700.0)))


def _over(record: Record, results: Results) -> str:
    """What of the stop rule is met, in words."""
    stop = record.definition.stop
    match results.over:
        case "conclusive":
            words = {"better": "is better", "worse": "is worse", "no_effect": "has no effect of the minimum size"}
            found = [f"{arm} {words[verdict]}" for arm, verdict in results.verdicts.items() if verdict in words]
            return f"conclusive; {', '.join(found)}"
        case "max_units":
            return f"{sum(results.n_units):,} units were exposed, max_units is {stop.max_units:,}"
        case _:
            return f"max_days ({stop.max_days:g}) are over"


def _harm(record: Record, results: Results, arms: Sequence[ArmCounts]) -> list[str]:
    definition = record.definition
    found: list[str] = []
    for arm, counts in zip(definition.arms, arms, strict=True):
        if n := counts.statuses.get("not_applied", 0):
            found.append(f"arm {arm.key}: {n} replies were not steered as asked")
        if error_e_value(counts.n_failed, counts.n_requests, definition.max_error_rate) >= 1 / ERROR_ALPHA:
            found.append(
                f"arm {arm.key}: {counts.n_failed} of {counts.n_requests} requests failed, credibly more than "
                f"{definition.max_error_rate:g}"
            )
    found += [
        f"guardrail {rail.metric}: arm {rail.arm} is worse by {rail.harm:.3g} (at least {rail.low:.3g}), and {rail.margin:g} is "
        "tolerated"
        for rail in results.guardrails
        if rail.state == "breached"
    ]
    if results.sample_ratio_p <= SAMPLE_RATIO_ALPHA:
        found.append(f"units are not split as they should be (sample ratio mismatch, p = {results.sample_ratio_p:.2g})")
    return found
