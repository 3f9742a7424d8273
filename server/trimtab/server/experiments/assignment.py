"""Which arm a unit gets: GrowthBook's SDK, offline, in the serving process, the same on every replica and after every restart.

    n = fnv1a32(str(fnv1a32(seed + unit))) mod 10000 / 10000        hash version 2, seed = the experiment's key
    arm k's range at coverage c:  [Σ_{j<k} w_j,  Σ_{j<k} w_j + c · w_k)

A range grows to the right of a fixed start and never reaches the next one, so a ramp of the coverage only adds units; none
changes its arm. The layer and the global holdout are filters with seeds of their own, independent of the experiment's hash.

A unit that does not take part is told why, in one of `REASONS`; a decision is pure and keeps no state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from growthbook import Experiment as Rule
from growthbook.common_types import EvaluationContext, GlobalContext, Options, StackContext, UserContext
from growthbook.core import evalCondition, gbhash, getBucketRanges, inRange, run_experiment

from trimtab.server.experiments.definition import BUCKETS, Arm, Experiment
from trimtab.server.experiments.lifecycle import Record

__all__ = ["MAX_UNIT", "REASONS", "Assignment", "Decide", "Reason", "assign", "shares"]

MAX_UNIT = 256
"""Characters of a unit id; a longer one is not enrolled: hashing it would hold up the reply."""

Reason = Literal[
    "assigned",
    "forced",
    "not_running",
    "missing_unit",
    "malformed_unit",
    "targeting",
    "layer",
    "holdout",
    "coverage",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

Decide = Callable[[Experiment, str, Mapping[str, Any]], Arm | None]
"""The arm of an experiment for a unit with these attributes; None lets it out."""

_HOLDOUT = "trimtab:holdout"
_GLOBAL = GlobalContext(options=Options(enabled=True))


@dataclass(frozen=True)
class Assignment:
    """What was decided for one request in one experiment."""

    experiment: str
    revision: int
    reason: Reason
    arm: Arm | None = None
    """None: not enrolled; the request is served as if there were no experiment."""
    unit: str | None = None
    """The raw id; only its keyed hash may be stored."""
    bucket: int | None = None
    """0 … 9999."""

    @property
    def analysed(self) -> bool:
        """Whether the unit counts: forced arms do not."""
        return self.reason == "assigned"


def assign(
    record: Record,
    attributes: Mapping[str, Any],
    *,
    forced: str | None = None,
    holdout: float = 0.0,
    decide: Decide | None = None,
) -> Assignment:
    """The arm for a request with these `attributes`, among them the experiment's unit; `forced` names an arm to get regardless.

    `forced` needs a scope of the caller's key, which the service checks; an unknown arm name enrols nobody. `decide` gives the
    arms of experiments that leave this to OpenFeature; who takes part at all is decided here for them as well.
    """
    experiment = record.definition

    def told(reason: Reason, arm: Arm | None = None, unit: str | None = None, bucket: int | None = None) -> Assignment:
        return Assignment(experiment.key, record.revision, reason, arm, unit, bucket)

    if record.state != "running":
        return told("not_running")
    unit = attributes.get(experiment.unit)
    if forced is not None:
        return told("forced", experiment.arm(forced), unit if isinstance(unit, str) else None)
    if unit is None or unit == "":
        return told("missing_unit")
    if not isinstance(unit, str) or len(unit) > MAX_UNIT or not unit.isprintable():
        return told("malformed_unit")
    if experiment.targeting and not evalCondition(dict(attributes), experiment.targeting):
        return told("targeting", unit=unit)
    if experiment.respects_holdout and holdout and _hash(_HOLDOUT, unit) < holdout:
        return told("holdout", unit=unit)
    layer = experiment.layer
    if layer and not inRange(_hash(f"layer:{layer.key}", unit), (layer.start, layer.end)):
        return told("layer", unit=unit)

    if experiment.assigned_by == "openfeature":
        covered = inRange(_hash(f"coverage:{experiment.key}", unit), (0.0, record.coverage))
        arm = decide(experiment, unit, attributes) if covered and decide is not None else None
        return told("coverage" if arm is None else "assigned", arm, unit)
    context = EvaluationContext(
        user=UserContext(attributes={experiment.unit: unit}), global_ctx=_GLOBAL, stack=StackContext()
    )
    result = run_experiment(_rule(experiment, record.coverage), evalContext=context)
    bucket = round(_hash(experiment.key, unit) * BUCKETS)
    if not result.inExperiment:
        return told("coverage", unit=unit, bucket=bucket)
    return told("assigned", experiment.arms[result.variationId], unit, bucket)


def shares(experiment: Experiment, coverage: float) -> tuple[float, ...]:
    """The share of the enrolled units that each arm really gets, in whole buckets; what a sample ratio is tested against."""
    if experiment.assigned_by == "openfeature":
        return tuple(arm.weight for arm in experiment.arms)
    ranges = getBucketRanges(len(experiment.arms), coverage, [arm.weight for arm in experiment.arms])
    counts = [sum(inRange(n / BUCKETS, bounds) for n in range(BUCKETS)) for bounds in ranges]
    total = sum(counts)
    return tuple(count / total for count in counts) if total else tuple(arm.weight for arm in experiment.arms)


def _rule(experiment: Experiment, coverage: float) -> Rule[int]:
    return Rule(
        key=experiment.key,
        variations=list(range(len(experiment.arms))),
        weights=[arm.weight for arm in experiment.arms],
        coverage=coverage,
        hashAttribute=experiment.unit,
        hashVersion=2,
        seed=experiment.key,
    )


def _hash(seed: str, unit: str) -> float:
    """0 … 1, in steps of a bucket."""
    n = gbhash(seed, unit, 2)
    if n is None:
        raise RuntimeError("the growthbook SDK no longer knows hash version 2")
    return n
