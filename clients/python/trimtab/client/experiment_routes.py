"""`client.experiments` and `client.outcomes`.

Written by `make client` from `aio_experiments`; do not edit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trimtab.client import experiment_calls as ask
from trimtab.client.experiments import (
    Experiment,
    ExperimentHealth,
    ExperimentResults,
    Look,
    Outcome,
    Recorded,
    read_experiment,
    read_experiments,
    read_health,
    read_looks,
    read_recorded,
    read_results,
)

if TYPE_CHECKING:
    from trimtab.client.rest import Rest
    from trimtab.client.rpc import Grpc

__all__ = ["ExperimentRoutes", "OutcomeRoutes"]


class ExperimentRoutes:
    """`/admin/v1/experiments`: A/B tests of mitigations; needs a key of scope `admin`, and to read one of scope `observe`.

    Every change takes a `reason`, which goes to the audit log, and returns the experiment after it. With `revision` it is refused
    (`StaleRevisionError`) if somebody else changed the experiment since you read it.
    """

    def __init__(self, wire: Rest | Grpc) -> None:
        self._wire = wire

    def create(self, definition: Mapping[str, Any], *, reason: str) -> Experiment:
        """A new experiment, a draft.

        Raises:
            InvalidExperimentError: the definition breaks a rule; `violations` has every one.
            ConflictError: its key is taken.
        """
        return read_experiment(self._wire.call(ask.create(definition, reason)))

    def edit(self, key: str, definition: Mapping[str, Any], *, reason: str, revision: int | None = None) -> Experiment:
        """The draft with another definition.

        Raises:
            InvalidExperimentError: the definition breaks a rule.
            ExperimentStateError: it has started, and is immutable but for coverage.
        """
        return read_experiment(self._wire.call(ask.edit(key, definition, reason, revision)))

    def list(self, *, state: str | None = None) -> tuple[Experiment, ...]:
        """All experiments, or those in a state, by key."""
        return read_experiments(self._wire.call(ask.find(state=state)))

    def get(self, key: str) -> Experiment:
        """An experiment with its history.

        Raises:
            UnknownExperimentError: there is none of that key.
        """
        return read_experiment(self._wire.call(ask.find(key)))

    def start(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It enrols from now on, at the first step of its ramp.

        Raises:
            InvalidExperimentError: what an arm gives cannot be had.
        """
        return self._change(key, "start", reason, revision)

    def ramp(self, key: str, coverage: float, *, reason: str, revision: int | None = None) -> Experiment:
        """Another share of the units takes part; no unit changes its arm. It leaves the ramp schedule."""
        return self._change(key, "ramp", reason, revision, coverage=coverage)

    def approve(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """The next step of the ramp schedule may be taken."""
        return self._change(key, "approve", reason, revision)

    def pause(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It enrols nobody until `resume`; requests are served as if it were not there."""
        return self._change(key, "pause", reason, revision)

    def resume(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It goes on."""
        return self._change(key, "resume", reason, revision)

    def stop(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It is over; requests that run finish as they began."""
        return self._change(key, "stop", reason, revision)

    def kill(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It is over on every replica, and requests of it that run end with an error."""
        return self._change(key, "kill", reason, revision)

    def archive(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It is put away; it can still be read."""
        return self._change(key, "archive", reason, revision)

    def purge(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """What it measured is deleted, for good, once it is archived; its definition and history stay. Take its report before."""
        return self._change(key, "purge", reason, revision)

    def health(self, key: str) -> ExperimentHealth:
        """Whether what is measured can be trusted, and what happens next."""
        return read_health(self._wire.call(ask.find(key, "health")))

    def results(self, key: str) -> ExperimentResults:
        """What can be said now; it may be looked at, and acted on, at any time."""
        return read_results(self._wire.call(ask.find(key, "results")))

    def looks(self, key: str, *, n_looks: int = 30) -> tuple[Look, ...]:
        """How the primary metric stood at moments from the start until now."""
        return read_looks(self._wire.call(ask.find(key, "looks", count=n_looks)))

    def exposures(self, key: str) -> Iterator[dict[str, Any]]:
        """Every exposure, page by page."""
        return self._rows(key, "exposures")

    def outcomes(self, key: str) -> Iterator[dict[str, Any]]:
        """Every outcome of its replies and units, page by page."""
        return self._rows(key, "outcomes")

    def texts(self, key: str) -> Iterator[dict[str, Any]]:
        """Every prompt and reply that was sampled and is still kept; needs scope `admin`, and the audit log tells who reads."""
        return self._rows(key, "texts")

    def holdout(self) -> float:
        """The share of all units that no experiment takes in."""
        return float((self._wire.call(ask.holdout()))["share"])

    def hold_out(self, share: float, *, reason: str) -> float:
        """Another share."""
        return float((self._wire.call(ask.holdout(share, reason)))["share"])

    def _change(self, key: str, action: str, reason: str, revision: int | None, **values: Any) -> Experiment:
        return read_experiment(self._wire.call(ask.change(key, action, reason, revision, **values)))

    def _rows(self, key: str, part: str) -> Iterator[dict[str, Any]]:
        after: str | None = ""
        while after is not None:
            text, headers = self._wire.text(ask.page(key, part, after))
            for line in text.splitlines():
                yield json.loads(line)
            after = headers.get(ask.NEXT_PAGE)


class OutcomeRoutes:
    """`/v1/outcomes`: what became of replies, told by the application; a key of scope `infer` will do.

    Telling an outcome again changes nothing, so a call that failed may be repeated; another value of it is a `ConflictError`.
    """

    def __init__(self, wire: Rest | Grpc) -> None:
        self._wire = wire

    def record(self, response: object, name: str, value: float, *, event: str = "") -> Recorded:
        """Tells one outcome of a reply, which is given itself or by its id."""
        return self.record_all([ask.outcome_of(response, name, value, event)])

    def record_all(self, outcomes: Iterable[Outcome]) -> Recorded:
        """Tells up to 1,000 at once; all are kept, or none."""
        return read_recorded(self._wire.call(ask.record(list(outcomes))))
