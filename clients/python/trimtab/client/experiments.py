"""Experiments as a server tells of them: how they stand, whether they are healthy, what can be said now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from trimtab.client.bundles import read
from trimtab.client.errors import TrimtabError

__all__ = [
    "OVER",
    "ArmHealth",
    "Change",
    "Effect",
    "Experiment",
    "ExperimentHealth",
    "ExperimentResults",
    "GuardrailResult",
    "Look",
    "NextStep",
    "Outcome",
    "Recorded",
    "read_experiment",
    "read_experiments",
    "read_health",
    "read_looks",
    "read_recorded",
    "read_results",
]

OVER = ("stopped", "archived", "purged")
"""States in which nobody will be enrolled again."""


@dataclass(frozen=True)
class Change:
    """One change of an experiment."""

    revision: int
    action: str
    actor: str
    reason: str
    at: datetime
    state: str
    """After it."""
    coverage: float
    """After it."""


@dataclass(frozen=True)
class Experiment:
    """An experiment as it stands."""

    key: str
    state: str
    """`draft`, `running`, `paused`, `stopped`, `archived` or `purged`."""
    coverage: float
    """The share of the units that take part; 0 … 1."""
    revision: int
    """Rises by one with every change; give it with one that must not undo somebody else's."""
    changed_at: datetime
    covered_since: datetime
    started_at: datetime | None
    step: int | None
    """Of the ramp schedule, taken last; None once a ramp by hand has left it."""
    approved: int
    """The last step of the schedule that somebody approved."""
    plans: Mapping[str, str]
    """By arm, what its steering compiled to when it was started."""
    definition: Mapping[str, Any]
    history: tuple[Change, ...] = ()
    """Oldest first; of `get` alone."""

    @property
    def is_over(self) -> bool:
        """Whether it will never enrol again."""
        return self.state in OVER


@dataclass(frozen=True)
class ArmHealth:
    """What became of the requests of one arm."""

    key: str
    units: int
    triggered_units: int
    """Units whose generation was, or would have been, altered."""
    requests: int
    statuses: Mapping[str, int]
    """Requests by how they ended."""


@dataclass(frozen=True)
class NextStep:
    """The next step of the ramp schedule."""

    coverage: float
    at: datetime
    """When its hold is over."""
    min_units: int
    waits_for: tuple[str, ...]
    """`hold`, `units`, `approval`, `health`, `paused`."""


@dataclass(frozen=True)
class ExperimentHealth:
    """Whether what is measured can be trusted, and what happens next."""

    key: str
    state: str
    coverage: float
    revision: int
    healthy: bool
    problems: tuple[str, ...]
    decisions: Mapping[str, int]
    """Requests that were not enrolled, by reason."""
    written: int
    """Exposures that count."""
    dropped: int
    """Exposures that were lost; even one makes the experiment unhealthy."""
    waiting: int
    """Exposures that the answering replica has not written yet."""
    arms: tuple[ArmHealth, ...]
    crossovers: int
    """Units seen in two arms, and left out."""
    sample_ratio_p: float
    next_step: NextStep | None


@dataclass(frozen=True)
class Effect:
    """A treated arm against the control on one metric; what cannot be said yet is None."""

    metric: str
    arm: str
    population: str
    """`intent_to_treat`, `triggered` or `per_protocol`."""
    n_control: int
    n_treated: int
    control: float | None
    treated: float | None
    estimate: float | None
    """Treated − control."""
    low: float | None
    high: float | None
    """Its confidence sequence, which holds at every look."""
    p: float
    """Always valid; of secondary metrics corrected."""


@dataclass(frozen=True)
class GuardrailResult:
    """How much worse than the control a treated arm is on a guardrail."""

    metric: str
    arm: str
    margin: float
    harm: float | None
    low: float | None
    high: float | None
    state: str
    """`collecting`, `safe` or `breached`."""


@dataclass(frozen=True)
class ExperimentResults:
    """What can be said now, validly at every look."""

    key: str
    state: str
    coverage: float
    revision: int
    units: Mapping[str, int]
    """By arm."""
    crossovers: int
    sample_ratio_p: float
    primary: str
    minimum_effect: float
    alpha: float
    verdicts: Mapping[str, str]
    """By treated arm: `collecting`, `better`, `worse`, `no_effect` or `invalid`."""
    effects: tuple[Effect, ...]
    guardrails: tuple[GuardrailResult, ...]
    units_needed: int | None
    power: float | None
    """Of finding the minimum effect by the planned number of units."""
    days_left: float | None
    over: str | None
    """What of the stop rule is met."""
    notes: tuple[str, ...]
    """What to know before believing the rest."""
    document: Mapping[str, Any] = field(repr=False, compare=False)
    """The JSON that the server sent."""

    def effect(self, arm: str, metric: str | None = None, population: str = "intent_to_treat") -> Effect:
        """Of one arm, on the primary metric unless another is named.

        Raises:
            KeyError: there is no such arm or metric.
        """
        wanted = (arm, metric or self.primary, population)
        for one in self.effects:
            if (one.arm, one.metric, one.population) == wanted:
                return one
        raise KeyError(wanted)


@dataclass(frozen=True)
class Look:
    """The primary metric as it stood at one moment."""

    at: datetime
    units: Mapping[str, int]
    effects: tuple[Effect, ...]
    """By intent to treat, one per treated arm."""


@dataclass(frozen=True)
class Outcome:
    """Something measured of a reply (`response`, its id), or of a unit (`unit={"user": "u-17"}`)."""

    name: str
    value: float
    response: str | None = None
    unit: Mapping[str, str] | None = None
    event: str = ""
    """Which of several of one name; telling one again changes nothing."""
    at: datetime | None = None
    """When it was so; now, unless given."""

    def to_dict(self) -> dict[str, Any]:
        """Its JSON."""
        said: dict[str, Any] = {"name": self.name, "value": self.value}
        if self.response is not None:
            said["response_id"] = self.response
        if self.unit is not None:
            said["unit"] = dict(self.unit)
        if self.event:
            said["event"] = self.event
        if self.at is not None:
            if self.at.tzinfo is None:
                raise ValueError(f"the time {self.at} of outcome {self.name!r} has no zone; use datetime.now(UTC)")
            said["at"] = self.at.isoformat()
        return said


@dataclass(frozen=True)
class Recorded:
    """What became of outcomes that were told."""

    recorded: int
    duplicate: int
    """Were known already."""
    pending: int
    """Of all, those whose reply is in no exposure that is known yet."""


def read_experiment(document: Any) -> Experiment:
    """An answer about one experiment."""
    return read(_experiment, document)


def read_experiments(document: Any) -> tuple[Experiment, ...]:
    """The experiments of a listing."""
    return read(lambda listing: tuple(_experiment(item) for item in listing["data"]), document)


def read_health(document: Any) -> ExperimentHealth:
    """The health of one."""

    def parse(answer: Any) -> ExperimentHealth:
        step, exposures = answer["next_step"], answer["exposures"]
        return ExperimentHealth(
            key=str(answer["key"]),
            state=str(answer["state"]),
            coverage=float(answer["coverage"]),
            revision=int(answer["revision"]),
            healthy=bool(answer["healthy"]),
            problems=tuple(map(str, answer["problems"])),
            decisions=_counts(answer["decisions"]),
            written=int(exposures["written"]),
            dropped=int(exposures["dropped"]),
            waiting=int(exposures["waiting"]),
            arms=tuple(
                ArmHealth(
                    str(arm["key"]),
                    int(arm["units"]),
                    int(arm["triggered_units"]),
                    int(arm["requests"]),
                    _counts(arm["statuses"]),
                )
                for arm in answer["arms"]
            ),
            crossovers=int(answer["crossovers"]),
            sample_ratio_p=float(answer["sample_ratio_p"]),
            next_step=None
            if step is None
            else NextStep(
                float(step["coverage"]), _time(step["at"]), int(step["min_units"]), tuple(map(str, step["waits_for"]))
            ),
        )

    return read(parse, document)


def read_results(document: Any) -> ExperimentResults:
    """The results of one."""

    def parse(answer: Any) -> ExperimentResults:
        return ExperimentResults(
            key=str(answer["key"]),
            state=str(answer["state"]),
            coverage=float(answer["coverage"]),
            revision=int(answer["revision"]),
            units=_counts(answer["units"]),
            crossovers=int(answer["crossovers"]),
            sample_ratio_p=float(answer["sample_ratio_p"]),
            primary=str(answer["primary"]),
            minimum_effect=float(answer["minimum_effect"]),
            alpha=float(answer["alpha"]),
            verdicts=MappingProxyType({str(arm): str(verdict) for arm, verdict in answer["verdicts"].items()}),
            effects=tuple(_effect(one) for one in answer["effects"]),
            guardrails=tuple(
                GuardrailResult(**{name: rail[name] for name in GuardrailResult.__dataclass_fields__})
                for rail in answer["guardrails"]
            ),
            units_needed=answer["units_needed"],
            power=answer["power"],
            days_left=answer["days_left"],
            over=answer["over"],
            notes=tuple(map(str, answer["notes"])),
            document=answer,
        )

    return read(parse, document)


def read_looks(document: Any) -> tuple[Look, ...]:
    """How the primary metric stood over time."""

    def parse(answer: Any) -> tuple[Look, ...]:
        return tuple(
            Look(_time(look["at"]), _counts(look["units"]), tuple(_effect(one) for one in look["effects"]))
            for look in answer["data"]
        )

    return read(parse, document)


def read_recorded(document: Any) -> Recorded:
    """The answer to outcomes."""
    return read(lambda answer: Recorded(*(int(answer[name]) for name in Recorded.__dataclass_fields__)), document)


def _experiment(answer: Any) -> Experiment:
    started = answer["started_at"]
    return Experiment(
        key=str(answer["key"]),
        state=str(answer["state"]),
        coverage=float(answer["coverage"]),
        revision=int(answer["revision"]),
        changed_at=_time(answer["changed_at"]),
        covered_since=_time(answer["covered_since"]),
        started_at=None if started is None else _time(started),
        step=answer["step"],
        approved=int(answer["approved"]),
        plans=MappingProxyType(dict(answer["plans"])),
        definition=MappingProxyType(dict(answer["definition"])),
        history=tuple(
            Change(
                revision=int(change["revision"]),
                action=str(change["action"]),
                actor=str(change["actor"]),
                reason=str(change["reason"]),
                at=_time(change["at"]),
                state=str(change["state"]),
                coverage=float(change["coverage"]),
            )
            for change in answer.get("history", ())
        ),
    )


def _effect(answer: Any) -> Effect:
    return Effect(**{name: answer[name] for name in Effect.__dataclass_fields__})


def _counts(answer: Any) -> Mapping[str, int]:
    return MappingProxyType({str(name): int(n) for name, n in answer.items()})


def _time(text: Any) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError) as e:
        raise TrimtabError(f"the server's time {text!r} cannot be read") from e
