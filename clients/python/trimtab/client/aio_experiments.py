"""`client.experiments` and `client.outcomes` of the asynchronous client: `experiment_routes` with `await`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
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
    from trimtab.client.rest import AsyncRest
    from trimtab.client.rpc import AsyncGrpc

__all__ = ["AsyncExperimentRoutes", "AsyncOutcomeRoutes"]


class AsyncExperimentRoutes:
    """`/admin/v1/experiments`: A/B tests of mitigations; needs a key of scope `admin`, and to read one of scope `observe`.

    Every change takes a `reason`, which goes to the audit log, and returns the experiment after it. With `revision` it is refused
    (`StaleRevisionError`) if somebody else changed the experiment since you read it.
    """

    def __init__(self, wire: AsyncRest | AsyncGrpc) -> None:
        self._wire = wire

    async def create(self, definition: Mapping[str, Any], *, reason: str) -> Experiment:
        """A new experiment, a draft.

        Raises:
            InvalidExperimentError: the definition breaks a rule; `violations` has every one.
            ConflictError: its key is taken.
        """
        return read_experiment(await self._wire.call(ask.create(definition, reason)))

    async def edit(
        self, key: str, definition: Mapping[str, Any], *, reason: str, revision: int | None = None
    ) -> Experiment:
        """The draft with another definition.

        Raises:
            InvalidExperimentError: the definition breaks a rule.
            ExperimentStateError: it has started, and is immutable but for coverage.
        """
        return read_experiment(await self._wire.call(ask.edit(key, definition, reason, revision)))

    async def list(self, *, state: str | None = None) -> tuple[Experiment, ...]:
        """All experiments, or those in a state, by key."""
        return read_experiments(await self._wire.call(ask.find(state=state)))

    async def get(self, key: str) -> Experiment:
        """An experiment with its history.

        Raises:
            UnknownExperimentError: there is none of that key.
        """
        return read_experiment(await self._wire.call(ask.find(key)))

    async def start(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It enrols from now on, at the first step of its ramp.

        Raises:
            InvalidExperimentError: what an arm gives cannot be had.
        """
        return await self._change(key, "start", reason, revision)

    async def ramp(self, key: str, coverage: float, *, reason: str, revision: int | None = None) -> Experiment:
        """Another share of the units takes part; no unit changes its arm. It leaves the ramp schedule."""
        return await self._change(key, "ramp", reason, revision, coverage=coverage)

    async def approve(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """The next step of the ramp schedule may be taken."""
        return await self._change(key, "approve", reason, revision)

    async def pause(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It enrols nobody until `resume`; requests are served as if it were not there."""
        return await self._change(key, "pause", reason, revision)

    async def resume(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It goes on."""
        return await self._change(key, "resume", reason, revision)

    async def stop(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It is over; requests that run finish as they began."""
        return await self._change(key, "stop", reason, revision)

    async def kill(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It is over on every replica, and requests of it that run end with an error."""
        return await self._change(key, "kill", reason, revision)

    async def archive(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """It is put away; it can still be read."""
        return await self._change(key, "archive", reason, revision)

    async def purge(self, key: str, *, reason: str, revision: int | None = None) -> Experiment:
        """What it measured is deleted, for good, once it is archived; its definition and history stay. Take its report before."""
        return await self._change(key, "purge", reason, revision)

    async def health(self, key: str) -> ExperimentHealth:
        """Whether what is measured can be trusted, and what happens next."""
        return read_health(await self._wire.call(ask.find(key, "health")))

    async def results(self, key: str) -> ExperimentResults:
        """What can be said now; it may be looked at, and acted on, at any time."""
        return read_results(await self._wire.call(ask.find(key, "results")))

    async def looks(self, key: str, *, n_looks: int = 30) -> tuple[Look, ...]:
        """How the primary metric stood at moments from the start until now."""
        return read_looks(await self._wire.call(ask.find(key, "looks", count=n_looks)))

    def exposures(self, key: str) -> AsyncIterator[dict[str, Any]]:
        """Every exposure, page by page."""
        return self._rows(key, "exposures")

    def outcomes(self, key: str) -> AsyncIterator[dict[str, Any]]:
        """Every outcome of its replies and units, page by page."""
        return self._rows(key, "outcomes")

    def texts(self, key: str) -> AsyncIterator[dict[str, Any]]:
        """Every prompt and reply that was sampled and is still kept; needs scope `admin`, and the audit log tells who reads."""
        return self._rows(key, "texts")

    async def holdout(self) -> float:
        """The share of all units that no experiment takes in."""
        return float((await self._wire.call(ask.holdout()))["share"])

    async def hold_out(self, share: float, *, reason: str) -> float:
        """Another share."""
        return float((await self._wire.call(ask.holdout(share, reason)))["share"])

    async def _change(self, key: str, action: str, reason: str, revision: int | None, **values: Any) -> Experiment:
        return read_experiment(await self._wire.call(ask.change(key, action, reason, revision, **values)))

    async def _rows(self, key: str, part: str) -> AsyncIterator[dict[str, Any]]:
        after: str | None = ""
        while after is not None:
            text, headers = await self._wire.text(ask.page(key, part, after))
            for line in text.splitlines():
                yield json.loads(line)
            after = headers.get(ask.NEXT_PAGE)


class AsyncOutcomeRoutes:
    """`/v1/outcomes`: what became of replies, told by the application; a key of scope `infer` will do.

    Telling an outcome again changes nothing, so a call that failed may be repeated; another value of it is a `ConflictError`.
    """

    def __init__(self, wire: AsyncRest | AsyncGrpc) -> None:
        self._wire = wire

    async def record(self, response: object, name: str, value: float, *, event: str = "") -> Recorded:
        """Tells one outcome of a reply, which is given itself or by its id."""
        return await self.record_all([ask.outcome_of(response, name, value, event)])

    async def record_all(self, outcomes: Iterable[Outcome]) -> Recorded:
        """Tells up to 1,000 at once; all are kept, or none."""
        return read_recorded(await self._wire.call(ask.record(list(outcomes))))
