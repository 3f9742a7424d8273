"""Who takes part in which experiment: decided before any other work on a request, from what this replica knows, without waiting.

A request is in one experiment at most: in the first, by the time that they were started, whose arms it is assigned to. Why it is
not in one that runs is counted: `assignment.REASONS`, and

    own_steering     it brings steering of its own, or names a model that does
    kill_switch      the kill switch is thrown
    stale            this replica has not heard of the database for too long
    not_a_chat       the experiment has a prompt-only arm, and this is a text completion
    beam_search      it cannot be steered
    other            it is in another experiment
    refused          it was assigned, and then refused for what the caller wrote

`assigned` and `forced` are counted as well: what was assigned and not refused, and is no longer running, was exposed, or dropped.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from trimtab.server.database.database import text_of, utc_now
from trimtab.server.errors import InvalidRequest, InvalidSteering, Revoked, Unavailable, UnknownBundle, Violation
from trimtab.server.experiments.assignment import Assignment, Decide, assign
from trimtab.server.experiments.definition import Arm, Experiment, Grading, TextSampling
from trimtab.server.experiments.errors import InvalidExperiment
from trimtab.server.experiments.exposures import Exposure, Exposures, Status
from trimtab.server.experiments.lifecycle import Record
from trimtab.server.experiments.outcomes import unit_digest
from trimtab.server.experiments.texts import sampled
from trimtab.server.experiments.units import PREFIX, attributes, forced_arm
from trimtab.server.keys.key import Caller
from trimtab.server.plan import compile_plan
from trimtab.server.service.arm import ArmRule, is_gated
from trimtab.server.service.catalogue import Catalogue
from trimtab.server.service.grading import Graders, Reply, is_sampled
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.rules import names

__all__ = ["Enroller", "Enrolment", "plans_of"]


@dataclass(frozen=True)
class Enrolment:
    """One request's part in an experiment."""

    rule: ArmRule
    assignment: Assignment
    unit: str
    """The keyed hash of its unit."""
    request_id: str
    at: str
    """When that was decided."""
    gated: bool
    """Whether its arm alters it is for the gates to say."""
    blind: bool
    """The caller is not to know."""
    grading: tuple[Grading, ...]
    """Those that its reply was sampled for."""
    text: TextSampling | None
    """How its text is kept, if it was sampled for that."""

    @property
    def is_read(self) -> bool:
        """Whether anybody reads its reply: a grader, or whoever reads sampled texts."""
        return bool(self.grading) or self.text is not None

    @property
    def alters(self) -> str | None:
        """The experiment, if its arm does anything."""
        return None if self.rule.arm.treatment == (None, None) else self.rule.experiment

    def prompted(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """The request with the arm's prompt in front."""
        text = self.rule.arm.system_prompt
        if text is None:
            return document
        if "messages" in document:
            messages = document["messages"]
            own = [{"role": "system", "content": text}]
            return {**document, "messages": [*own, *messages]} if isinstance(messages, list) else document
        own_words = document.get("instructions")
        return {**document, "instructions": f"{text}\n\n{own_words}" if isinstance(own_words, str) else text}

    def tell(self, steering: dict[str, Any]) -> dict[str, Any]:
        """The `steering` object of a reply, as the caller may know it."""
        if self.blind:
            return {"status": "blinded"}
        return {**steering, "experiment": {"key": self.rule.experiment, "arm": self.rule.arm.key}}


class Enroller:
    """Enrols the requests of one replica, and hands over their exposures."""

    def __init__(
        self,
        catalogue: Catalogue,
        exposures: Exposures,
        graders: Graders,
        metrics: Metrics,
        *,
        digest: Callable[[str], str],
        is_stale: Callable[[], bool],
        decide: Decide | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._exposures = exposures
        self._graders = graders
        self._metrics = metrics
        self._digest = digest
        self._is_stale = is_stale
        self._decide = decide

    def enrol(
        self,
        document: Mapping[str, Any],
        models: Collection[str],
        *,
        caller: Caller,
        headers: Mapping[str, str],
        request_id: str,
    ) -> Enrolment | None:
        """The request's part, if it has one.

        Raises:
            InvalidRequest: what its headers say is not to be understood, or asks for an arm that is not there.
            Forbidden: it asks for an arm, and its key does not allow that.
        """
        wanted = forced_arm(headers)
        if wanted is not None:
            caller.require(("force",))
            self._check_arm(*wanted)
        running = [record for record in self._catalogue.snapshot.experiments if record.state == "running"]
        if not running:
            return None
        given = attributes(headers, document, key_id=caller.key_id, request_id=request_id)
        found: Enrolment | None = None
        for record in running:
            key = record.definition.key
            if wanted is not None and wanted[0] != key:
                self._count(key, "other")
                continue
            if (reason := self._barred(record, document, models, found)) is not None:
                self._count(key, reason)
                continue
            forced = None if wanted is None else wanted[1]
            holdout = self._catalogue.snapshot.holdout
            assignment = assign(record, given, forced=forced, holdout=holdout, decide=self._decide)
            self._count(key, assignment.reason)
            if assignment.arm is not None:
                found = self._enrolment(record, assignment, assignment.arm, caller, request_id)
        return found

    def refused(self, enrolment: Enrolment) -> None:
        """It was not served, for what the caller wrote: nothing was, or would have been, altered."""
        self._count(enrolment.rule.experiment, "refused")

    def expose(
        self, enrolment: Enrolment, status: Status, *, n_fired: int, text: tuple[str, str] | None = None
    ) -> None:
        """It was served, or failed; `n_fired` tokens opened a gate. `text`: the prompt and the whole reply, if it is read."""
        key, arm = enrolment.rule.experiment, enrolment.rule.arm.key
        exposure = Exposure(
            response_id=enrolment.request_id,
            experiment=key,
            arm=arm,
            unit=enrolment.unit,
            revision=enrolment.assignment.revision,
            at=enrolment.at,
            forced=not enrolment.assignment.analysed,
            triggered=n_fired > 0 if enrolment.gated else True,
            status=status,
        )
        self._metrics.experiment_requests.labels(key, arm, status).inc()
        kept = None
        if text is not None and enrolment.text is not None:
            prompt, reply = text
            of = {"response_id": exposure.response_id, "experiment": key, "arm": arm, "at": exposure.at}
            kept = sampled(enrolment.text, **of, prompt=prompt, reply=reply)
        if not self._exposures.put(exposure, kept):
            self._metrics.exposures_dropped.labels(key).inc()

    def grade(self, enrolment: Enrolment, prompt: str, completion: str) -> None:
        """It is a reply that graders wait for."""
        experiment = enrolment.rule.experiment
        self._graders.put(Reply(enrolment.request_id, experiment, enrolment.grading, prompt, completion))

    def _enrolment(
        self, record: Record, assignment: Assignment, arm: Arm, caller: Caller, request_id: str
    ) -> Enrolment:
        definition = record.definition
        text = definition.text
        return Enrolment(
            rule=ArmRule.of(definition, arm, record.plans),
            assignment=assignment,
            unit=unit_digest(self._digest, definition.unit, assignment.unit or request_id),
            request_id=request_id,
            at=text_of(utc_now()),
            gated=is_gated(definition),
            blind=caller.policy.blind,
            grading=tuple(
                grading
                for grading in definition.grading
                if grading.grader in self._graders.named and is_sampled(request_id, grading.share)
            )
            if assignment.analysed
            else (),
            text=text if text is not None and assignment.analysed and is_sampled(request_id, text.share) else None,
        )

    def _barred(
        self, record: Record, document: Mapping[str, Any], models: Collection[str], found: Enrolment | None
    ) -> str | None:
        """Why the request is in this experiment whatever its unit is not."""
        if found is not None:
            return "other"
        if "steering" in document or document.get("model") not in models:
            return "own_steering"
        if self._catalogue.snapshot.switch.mode != "off":
            return "kill_switch"
        if self._is_stale():
            return "stale"
        if document.get("use_beam_search"):
            return "beam_search"
        is_chat = "messages" in document or "input" in document
        if not is_chat and any(arm.system_prompt is not None for arm in record.definition.arms):
            return "not_a_chat"
        return None

    def _check_arm(self, key: str, arm: str) -> None:
        record = next((r for r in self._catalogue.snapshot.experiments if r.definition.key == key), None)
        where = f"{PREFIX}arm"
        if record is None or record.state != "running":
            state = "is not there" if record is None else f"is {record.state}"
            raise InvalidRequest(
                [Violation(where, f"experiment {key[:63]!r} {state}; its arms can be had while it runs")]
            )
        if record.definition.arm(arm) is None:
            arms = ", ".join(arm.key for arm in record.definition.arms)
            raise InvalidRequest([Violation(where, f"experiment {key!r} has no arm {arm[:63]!r}; it has {arms}")])

    def _count(self, experiment: str, reason: str) -> None:
        self._exposures.count(experiment, reason)
        counter: Counter = self._metrics.experiment_decisions
        counter.labels(experiment, reason).inc()


def plans_of(
    definition: Experiment, catalogue: Catalogue, graders: Collection[str], *, can_ask: bool
) -> dict[str, str]:
    """By arm, the hash of the plan that its steering compiles to here and now.

    `can_ask` is whether the server has an OpenFeature provider to ask for arms.

    Raises:
        InvalidExperiment: an arm's steering cannot be had, or names a bundle whose meaning may change while it runs; or a grader
            is not one of this server's.
    """
    violations = [
        Violation(
            f"experiment.grading[{i}].grader",
            f"{grading.grader!r} is no grader of this server; its setting `graders` has {', '.join(graders) or 'none'}",
        )
        for i, grading in enumerate(definition.grading)
        if grading.grader not in graders
    ]
    if definition.assigned_by == "openfeature" and not can_ask:
        violations.append(
            Violation(
                "experiment.assigned_by", "this server has no OpenFeature provider; its setting is openfeature_provider"
            )
        )
    plans: dict[str, str] = {}
    for i, arm in enumerate(definition.arms):
        if arm.steering is None:
            continue
        where = f"experiment.arms[{i}].steering"
        try:
            for name in names(arm.steering):
                if (reference := catalogue.resolve(name)) != name:
                    violations.append(
                        Violation(where, f"{name!r} means another version once its default changes; name {reference}")
                    )
            plans[arm.key] = compile_plan(arm.steering, catalogue).hash
        except InvalidSteering as e:
            violations += [Violation(f"experiment.arms[{i}].{v.field}", v.message) for v in e.violations]
        except (Revoked, Unavailable, UnknownBundle) as e:
            violations.append(Violation(where, e.message))
    if violations:
        raise InvalidExperiment(violations)
    return plans
