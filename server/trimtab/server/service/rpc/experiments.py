"""`ExperimentService`: the routes of experiments of the HTTP API, in messages."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

from google.protobuf.json_format import ParseDict

from trimtab.server.database.database import utc_now
from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.experiments import documents
from trimtab.server.experiments.lifecycle import Action
from trimtab.server.experiments.outcomes import parse_outcomes
from trimtab.server.service import current
from trimtab.server.service.experiment_routes import health, purged, results, started
from trimtab.server.service.replica import Replica
from trimtab.server.service.rpc.calls import Calls
from trimtab.server.service.rpc.requests import structure
from trimtab.v1 import experiment_service_pb2 as v1
from trimtab.v1.experiment_service_pb2_grpc import ExperimentServiceServicer

__all__ = ["ExperimentCalls"]

WATCH_SECONDS = 5.0
POLL_SECONDS = 0.1


class ExperimentCalls(ExperimentServiceServicer):  # type: ignore[misc] # generated without types
    """Experiments of a fleet."""

    def __init__(self, replica: Replica, calls: Calls) -> None:
        self._replica = replica
        self._calls = calls

    async def CreateExperiment(self, request: v1.CreateExperimentRequest, context: Any) -> v1.Experiment:
        """A new draft."""
        async with self._calls.begun(context):
            definition = structure(request.definition, "definition")
            create, options = self._replica.experiments.create, _options(request)
            return _experiment(documents.experiment(await self._replica.change(create, definition, **options)))

    async def EditExperiment(self, request: v1.EditExperimentRequest, context: Any) -> v1.Experiment:
        """The draft with another definition."""
        async with self._calls.begun(context):
            definition = structure(request.definition, "definition")
            edit, options = self._replica.experiments.edit, _options(request, revised=True)
            record = await self._replica.change(edit, request.key, definition, **options)
            return _experiment(documents.experiment(record))

    async def GetExperiment(self, request: v1.GetExperimentRequest, context: Any) -> v1.Experiment:
        """One of them."""
        async with self._calls.begun(context):
            return _experiment(
                documents.experiment(await asyncio.to_thread(self._replica.experiments.find, request.key))
            )

    async def ListExperiments(self, request: v1.ListExperimentsRequest, context: Any) -> v1.ListExperimentsResponse:
        """All of them, or those in a state."""
        async with self._calls.begun(context):
            found = await asyncio.to_thread(self._replica.experiments.list)
            shown = [_experiment(documents.experiment(record)) for record in found]
            wanted = [one for one in shown if request.state in (v1.EXPERIMENT_STATE_UNSPECIFIED, one.state)]
            return v1.ListExperimentsResponse(experiments=wanted)

    async def StartExperiment(self, request: v1.ChangeExperimentRequest, context: Any) -> v1.Experiment:
        """The draft, started."""
        async with self._calls.begun(context):
            record = await started(self._replica, request.key, **_options(request, revised=True))
            return _experiment(documents.experiment(record))

    async def RampExperiment(self, request: v1.RampExperimentRequest, context: Any) -> v1.Experiment:
        """With another coverage."""
        return await self._moved(request, context, "ramp", coverage=request.coverage)

    async def ApproveExperiment(self, request: v1.ChangeExperimentRequest, context: Any) -> v1.Experiment:
        """With the next step approved."""
        return await self._moved(request, context, "approve")

    async def PauseExperiment(self, request: v1.ChangeExperimentRequest, context: Any) -> v1.Experiment:
        """Paused."""
        return await self._moved(request, context, "pause")

    async def ResumeExperiment(self, request: v1.ChangeExperimentRequest, context: Any) -> v1.Experiment:
        """Running again."""
        return await self._moved(request, context, "resume")

    async def StopExperiment(self, request: v1.ChangeExperimentRequest, context: Any) -> v1.Experiment:
        """Over."""
        return await self._moved(request, context, "stop")

    async def KillExperiment(self, request: v1.ChangeExperimentRequest, context: Any) -> v1.Experiment:
        """Over, with what its arms alter at the moment."""
        return await self._moved(request, context, "kill")

    async def ArchiveExperiment(self, request: v1.ChangeExperimentRequest, context: Any) -> v1.Experiment:
        """Put away."""
        return await self._moved(request, context, "archive")

    async def PurgeExperiment(self, request: v1.ChangeExperimentRequest, context: Any) -> v1.Experiment:
        """Without what it measured."""
        async with self._calls.begun(context):
            record = await purged(self._replica, request.key, **_options(request, revised=True))
            return _experiment(documents.experiment(record))

    async def GetExperimentHealth(self, request: v1.GetExperimentRequest, context: Any) -> v1.ExperimentHealth:
        """Whether what is measured can be trusted."""
        async with self._calls.begun(context):
            return _health(await asyncio.to_thread(health, self._replica, request.key, utc_now()))

    async def GetExperimentResults(self, request: v1.GetExperimentRequest, context: Any) -> v1.ExperimentResults:
        """What can be said now."""
        async with self._calls.begun(context):
            return _results(await asyncio.to_thread(results, self._replica, request.key, utc_now()))

    async def WatchExperiment(
        self, request: v1.WatchExperimentRequest, context: Any
    ) -> AsyncIterator[v1.WatchExperimentResponse]:
        """All of it, now and whenever it changes."""
        async with self._calls.begun(context):
            seconds = request.interval_seconds if request.HasField("interval_seconds") else WATCH_SECONDS
            if not 1 <= seconds <= 3600:
                raise InvalidRequest([Violation("interval_seconds", f"must be 1 … 3600, not {seconds:g}")])
            while True:
                sequence, told = self._replica.follower.snapshot.sequence, time.monotonic()
                record = await asyncio.to_thread(self._replica.experiments.find, request.key)
                now = utc_now()
                yield v1.WatchExperimentResponse(
                    experiment=_experiment(documents.experiment(record)),
                    health=_health(await asyncio.to_thread(health, self._replica, request.key, now)),
                    results=_results(await asyncio.to_thread(results, self._replica, request.key, now)),
                )
                if record.state == "archived":
                    return
                while self._replica.follower.snapshot.sequence == sequence and time.monotonic() - told < seconds:
                    if self._calls.is_draining:
                        return
                    await asyncio.sleep(POLL_SECONDS)

    async def RecordOutcomes(self, request: v1.RecordOutcomesRequest, context: Any) -> v1.RecordOutcomesResponse:
        """How many were new."""
        async with self._calls.begun(context):
            given = [_outcome(outcome, f"outcomes[{i}]") for i, outcome in enumerate(request.outcomes)]
            outcomes = parse_outcomes(given, self._replica.digest, now=utc_now())
            told = await asyncio.to_thread(self._replica.outcomes.record, outcomes)
            return v1.RecordOutcomesResponse(**{f"{name}_count": n for name, n in told.items()})

    async def _moved(self, request: Any, context: Any, action: Action, **more: Any) -> v1.Experiment:
        async with self._calls.begun(context):
            options = _options(request, revised=True) | more
            record = await self._replica.change(self._replica.experiments.change, request.key, action, **options)
            return _experiment(documents.experiment(record))


def _options(request: Any, *, revised: bool = False) -> dict[str, Any]:
    options: dict[str, Any] = {"actor": current.caller.get().name, "reason": request.reason}
    if revised:
        options["revision"] = request.revision if request.HasField("revision") else None
    return options


def _outcome(outcome: v1.Outcome, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": outcome.name, "value": outcome.value, "event": outcome.event}
    match outcome.WhichOneof("subject"):
        case "response_id":
            found["response_id"] = outcome.response_id
        case str() as kind:
            found["unit"] = {kind: getattr(outcome, kind)}
    if outcome.HasField("at"):
        try:
            found["at"] = outcome.at.ToJsonString()
        except ValueError as e:
            raise InvalidRequest([Violation(f"{path}.at", "is no time of the years 1 to 9999")]) from e
    return found


def _experiment(document: Mapping[str, Any]) -> v1.Experiment:
    state = f"EXPERIMENT_STATE_{document['state'].upper()}"
    return ParseDict({**_set(document), "state": state}, v1.Experiment())


def _health(document: Mapping[str, Any]) -> v1.ExperimentHealth:
    exposures, step = document["exposures"], document["next_step"]
    message = v1.ExperimentHealth(
        healthy=document["healthy"],
        problems=document["problems"],
        decisions=document["decisions"],
        written_count=exposures["written"],
        dropped_count=exposures["dropped"],
        waiting_count=exposures["waiting"],
        crossover_count=document["crossovers"],
        sample_ratio_p=document["sample_ratio_p"],
        arms=[
            v1.ArmHealth(
                key=arm["key"],
                unit_count=arm["units"],
                triggered_unit_count=arm["triggered_units"],
                request_count=arm["requests"],
                statuses=arm["statuses"],
            )
            for arm in document["arms"]
        ],
    )
    if step is not None:
        told = {"min_unit_count": step["min_units"], **{k: step[k] for k in ("coverage", "at", "waits_for")}}
        ParseDict(told, message.next_step)
    return message


def _results(document: Mapping[str, Any]) -> v1.ExperimentResults:
    return v1.ExperimentResults(
        units=document["units"],
        crossover_count=document["crossovers"],
        sample_ratio_p=document["sample_ratio_p"],
        verdicts={arm: _verdict(said) for arm, said in document["verdicts"].items()},
        effects=[
            v1.Effect(
                control_unit_count=one["n_control"],
                treated_unit_count=one["n_treated"],
                population=f"POPULATION_{one['population'].upper()}",
                **{name: one[name] for name in ("metric", "arm", "control", "treated", "estimate", "low", "high", "p")},
            )
            for one in document["effects"]
        ],
        guardrails=[
            v1.GuardrailResult(
                state=f"GUARDRAIL_STATE_{rail['state'].upper()}",
                **{name: rail[name] for name in ("metric", "arm", "margin", "harm", "low", "high")},
            )
            for rail in document["guardrails"]
        ],
        units_needed=document["units_needed"],
        days_left=document["days_left"],
        notes=document["notes"],
        power=document["power"],
        over=document["over"],
        triggered_ratio_p=document["triggered_ratio_p"],
    )


def _verdict(said: str) -> v1.Verdict:
    return cast(v1.Verdict, v1.Verdict.Value(f"VERDICT_{said.upper()}"))


def _set(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if value is not None}
