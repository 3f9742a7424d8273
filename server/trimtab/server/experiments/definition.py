"""An experiment as it is written down before it starts: arms, who is in it, what is measured, when it ends.

The first arm is the control. Weights say how units are split and are frozen with everything else; coverage, the share of the
units that take part, is no part of the definition: it is what a ramp moves (`lifecycle`). Assignment works in 10,000 buckets
(`assignment`), so weights are whole ten-thousandths.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.server.errors import Violation
from trimtab.server.experiments.errors import InvalidExperiment
from trimtab.server.steering import Steering

__all__ = [
    "BUCKETS",
    "Arm",
    "Experiment",
    "Grading",
    "Guardrail",
    "Layer",
    "Metric",
    "RampStep",
    "StopRule",
    "TextSampling",
    "Unit",
    "parse_experiment",
]

BUCKETS = 10_000
"""How finely traffic divides: the resolution of GrowthBook's hashing, version 2."""

OPERATORS = frozenset(
    {
        *("$and", "$or", "$nor", "$not", "$eq", "$ne", "$lt", "$lte", "$gt", "$gte", "$in", "$nin", "$ini", "$nini"),
        *("$all", "$exists", "$type", "$size", "$elemMatch", "$veq", "$vne", "$vgt", "$vgte", "$vlt", "$vlte"),
    }
)
"""What targeting may use of GrowthBook's conditions: no regular expressions, which can take for ever on a hostile attribute, and
no saved groups, which live in GrowthBook's own service. The SDK fails a condition that it does not understand, silently: nobody
would ever be enrolled."""

Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
Unit = Literal["user", "conversation", "tenant", "request"]
Direction = Literal["increase", "decrease"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Part):
    """What a unit gets. Neither steering nor a prompt: plain, as a control is."""

    key: Key
    weight: Annotated[float, Field(allow_inf_nan=False, gt=0, le=1)]
    steering: Steering | None = None
    """As the `steering` field of a request."""
    system_prompt: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    """Put before the messages of the request: the prompt-only arm that belongs in every comparison."""

    @property
    def treatment(self) -> tuple[Steering | None, str | None]:
        """What the arm does to a request, its name and weight apart."""
        return self.steering, self.system_prompt


class Metric(_Part):
    """Something measured per unit from its outcomes."""

    key: Key
    kind: Literal["mean", "proportion", "ratio"] = "mean"
    """`mean`: mean over units of a unit's sum. `proportion`: share of units with any outcome above 0. `ratio`: Σ numerator ÷
    Σ denominator over all units, by the delta method."""
    outcome: Key
    """The outcome whose values are summed per unit."""
    denominator: Key | None = None
    """For `ratio`: the outcome below the line."""
    covariate: Key | None = None
    """An outcome measured before the unit's first exposure, to reduce variance by (CUPED)."""
    direction: Direction = "increase"
    """Which way is better."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "ratio") != (self.denominator is not None):
            raise ValueError("a ratio needs a `denominator`, and nothing else takes one")
        if self.covariate is not None and self.kind == "ratio":
            raise ValueError("a covariate goes with a mean or a proportion; a ratio is not adjusted")
        return self


class Guardrail(_Part):
    """A metric that must not become worse than the control's by more than a margin."""

    metric: Metric
    margin: Positive
    """How much worse is still tolerable, in the metric's own unit; its `direction` says which way is better."""


class Grading(_Part):
    """A grader of the server's that judges a share of the replies, after they were sent; its verdicts are outcomes."""

    grader: Annotated[str, Field(min_length=1, max_length=100)]
    """Its name: of those that the server was started with."""
    outcome: Key
    share: Annotated[float, Field(allow_inf_nan=False, gt=0, le=1)] = 1.0
    """Of the replies, drawn by their ids."""
    value: Literal["verdict", "score"] = "verdict"
    """`verdict`: 1 where the behaviour shows, 0 where it does not; unclear ones are left out. `score`: the grader's number."""


class TextSampling(_Part):
    """Prompts and replies that are kept for people to read. Of an experiment without it no text is stored anywhere."""

    share: Annotated[float, Field(allow_inf_nan=False, gt=0, le=1)]
    """Of the replies, drawn by their ids."""
    days: Annotated[float, Field(allow_inf_nan=False, gt=0, le=365)]
    """How long each of them is kept."""


class StopRule(_Part):
    """When the experiment is over; units are those of all arms. Results are valid at every look, so it may also be stopped at any
    time."""

    when: Literal["conclusive", "horizon"] = "conclusive"
    """`conclusive`: once the primary metric's sequence excludes 0 or any effect of the minimum size. `horizon`: not before
    `max_units` or `max_days`."""
    min_units: Annotated[int, Field(ge=0)] = 0
    max_units: Annotated[int, Field(gt=0)] | None = None
    max_days: Positive | None = None
    automatic: bool = False
    """The server stops it then, by itself; otherwise it says that it is over, and leaves stopping it to you."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.when == "horizon" and self.max_units is None and self.max_days is None:
            raise ValueError("`horizon` needs `max_units` or `max_days`")
        return self


class Layer(_Part):
    """A slice of the traffic for this experiment alone: experiments of one layer with disjoint slices never share a unit."""

    key: Key
    start: Share = 0.0
    end: Share = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"is empty: [{self.start}, {self.end})")
        return self


class RampStep(_Part):
    """One step of the ramp schedule."""

    coverage: Share
    hold_hours: Annotated[float, Field(allow_inf_nan=False, ge=0)] = 0.0
    """How long this coverage is kept at least before the next step."""
    min_units: Annotated[int, Field(ge=0)] = 0
    """How many units must have been exposed before the next step."""
    approval: bool = False
    """A person must approve before this step is taken."""


class Experiment(_Part):
    """The whole definition; immutable once started."""

    key: Key
    hypothesis: Annotated[str, Field(min_length=1, max_length=2000)]
    arms: Annotated[tuple[Arm, ...], Field(min_length=2, max_length=16)]
    """The first is the control."""
    unit: Unit = "conversation"
    targeting: dict[str, Any] = Field(default_factory=dict)
    """A GrowthBook (MongoDB-like) condition over the request's attributes; empty is everybody."""
    assigned_by: Literal["trimtab", "openfeature"] = "trimtab"
    """Who says which arm a unit gets: this server, or the OpenFeature provider that it was started with, of which the key of this
    is a flag whose value is the key of an arm; weights are then what that provider is set to."""
    layer: Layer | None = None
    respects_holdout: bool = True
    """Whether the units of the server's global holdout stay out."""
    aa: bool = False
    """All arms do the same: a check of the machinery."""
    primary: Metric
    minimum_effect: Positive
    """The smallest absolute effect on the primary metric that is worth finding."""
    secondary: Annotated[tuple[Metric, ...], Field(max_length=32)] = ()
    guardrails: Annotated[tuple[Guardrail, ...], Field(max_length=32)] = ()
    grading: Annotated[tuple[Grading, ...], Field(max_length=8)] = ()
    text: TextSampling | None = None
    """Which prompts and replies are kept, and for how long; none, unless this is given."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    stop: StopRule = StopRule()
    ramp: tuple[RampStep, ...] = (RampStep(coverage=1.0),)
    max_error_rate: Share = 0.05
    """Rollback once an arm's share of failed requests is above this, credibly."""
    on_failure: Literal["closed", "open"] = "closed"
    """What a request of a treated arm gets when its steering fails: an error, or an unsteered reply, which per-protocol analysis
    leaves out and intent-to-treat keeps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(arm.weight for arm in self.arms)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"arms' weights must sum to 1, not {total:.6g}")
        for arm in self.arms:
            if abs(arm.weight * BUCKETS - round(arm.weight * BUCKETS)) > 1e-6:
                raise ValueError(f"arm {arm.key!r}: weight {arm.weight} is not a whole number of ten-thousandths")
        for name, keys in (
            ("arms", [arm.key for arm in self.arms]),
            ("metrics", [metric.key for metric in self.metrics]),
            ("gradings", [f"{grading.outcome} by {grading.grader}" for grading in self.grading]),
        ):
            if twice := [key for key, n in Counter(keys).items() if n > 1]:
                raise ValueError(f"{name} share a key: {', '.join(twice)}")
        if self.aa and any(arm.treatment != self.control.treatment for arm in self.arms):
            raise ValueError("an A/A has the same treatment in every arm")
        if not self.aa and any(arm.treatment == self.control.treatment for arm in self.arms[1:]):
            raise ValueError("an arm does what the control does; set `aa` if that is meant")
        if unknown := sorted(_operators(self.targeting) - OPERATORS):
            raise ValueError(f"targeting knows no {', '.join(unknown)}; it knows {' '.join(sorted(OPERATORS))}")
        coverages = [step.coverage for step in self.ramp]
        if not coverages or coverages != sorted(coverages) or coverages[0] == 0:
            raise ValueError("the ramp needs one or more steps of rising coverage above 0")
        return self

    @property
    def control(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[0]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All that is measured: primary, secondary, guardrails."""
        return (self.primary, *self.secondary, *(guardrail.metric for guardrail in self.guardrails))

    def arm(self, key: str) -> Arm | None:
        """The arm of that key."""
        return next((arm for arm in self.arms if arm.key == key), None)


def _operators(condition: Any) -> set[str]:
    match condition:
        case Mapping():
            own = {key for key in condition if key.startswith("$")}
            return own.union(*(_operators(value) for value in condition.values()))
        case list() | tuple():
            return set[str]().union(*(_operators(value) for value in condition))
        case _:
            return set()


def parse_experiment(value: Any) -> Experiment:
    """The validated definition.

    Raises:
        InvalidExperiment: with every violation at once, each with the path of its field.
    """
    if not isinstance(value, Mapping):
        raise InvalidExperiment([Violation("experiment", f"must be an object, not {type(value).__name__}")])
    try:
        return Experiment.model_validate(value)
    except ValidationError as e:
        raise InvalidExperiment([_violation(error) for error in e.errors()]) from e


def _violation(error: Any) -> Violation:
    path = "experiment"
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    if error["type"] == "extra_forbidden":
        return Violation(path, f"unknown field {error['loc'][-1]!r}")
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    return Violation(path, f"{message}, not {str(given)[:40]!r}" if isinstance(given, str | int | float) else message)
