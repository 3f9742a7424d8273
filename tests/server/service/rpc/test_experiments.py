"""Experiments over gRPC say what they say over HTTP, and calls tell their units in metadata."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from tests.server.experiments.examples import written
from tests.server.service.test_experiments import ARMS, KEY, UNITS
from tests.server.service.test_replica import CALM, Service
from trimtab.server.database.database import Database
from trimtab.server.service.rpc.server import RPC
from trimtab.v1 import experiment_service_pb2 as v1
from trimtab.v1 import inference_pb2, steering_pb2
from trimtab.v1.experiment_service_pb2_grpc import ExperimentServiceStub
from trimtab.v1.inference_pb2_grpc import InferenceServiceStub

NAN = Struct(fields={"alpha": Value(number_value=float("nan"))})
FAR = v1.Outcome(response_id="chatcmpl-" + "0" * 32, name="harm", value=1, at=Timestamp(seconds=2**62))


def struct(document: Any) -> Struct:
    return ParseDict(document, Struct())


class Called:
    """A service, and its gRPC port."""

    def __init__(self, service: Service, channel: grpc.aio.Channel) -> None:
        self.service = service
        self.experiments: Any = ExperimentServiceStub(channel)
        self.inference: Any = InferenceServiceStub(channel)

    async def create(self, **changes: Any) -> v1.Experiment:
        definition = struct(written(**({"arms": ARMS, "stop": {"max_units": 1000}} | changes)))
        made = await self.experiments.CreateExperiment(v1.CreateExperimentRequest(definition=definition, reason="new"))
        assert isinstance(made, v1.Experiment)
        return made

    async def change(self, name: str, **more: Any) -> v1.Experiment:
        request = v1.ChangeExperimentRequest(key=KEY, reason="because", **more)
        changed = await getattr(self.experiments, f"{name}Experiment")(request)
        assert isinstance(changed, v1.Experiment)
        return changed


@pytest.fixture
async def called(tmp_path: Path) -> AsyncIterator[Called]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    service = Service(database)
    await service.replica.start()
    await service.publish(CALM)
    rpc = RPC(service.generation, cast(Any, None), cast(Any, None), service.gate, service.replica)
    port = await rpc.start("127.0.0.1", 0, None)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Called(service, channel)
    await rpc.stop()
    await service.http.aclose()
    await service.replica.close()


async def test_an_experiment_lives_over_grpc(called: Called) -> None:
    made = await called.create()
    assert (made.state, made.revision, made.started_at.seconds) == (v1.EXPERIMENT_STATE_DRAFT, 1, 0)
    edited = v1.EditExperimentRequest(key=KEY, definition=struct(written(arms=ARMS, alpha=0.1)), reason="typo")
    assert (await called.experiments.EditExperiment(edited)).definition["alpha"] == 0.1
    started = await called.change("Start", revision=2)
    assert started.plans.keys() == {"calm"}
    assert started.started_at.seconds > 0
    ramped = await called.experiments.RampExperiment(v1.RampExperimentRequest(key=KEY, coverage=0.5, reason="ramp"))
    assert (ramped.coverage, ramped.HasField("step")) == (0.5, False)
    states = [(await called.change(name)).state for name in ("Pause", "Resume", "Stop", "Archive", "Purge")]
    assert states == [3, 2, 4, 5, 6]
    listed = await called.experiments.ListExperiments(v1.ListExperimentsRequest(state=v1.EXPERIMENT_STATE_PURGED))
    assert [one.key for one in listed.experiments] == [KEY]
    assert not (
        await called.experiments.ListExperiments(v1.ListExperimentsRequest(state=v1.EXPERIMENT_STATE_RUNNING))
    ).experiments


async def test_a_call_is_of_the_arm_of_the_unit_in_its_metadata(called: Called) -> None:
    await called.create()
    await called.change("Start")
    await called.service.will_prove({"bundle": "calm:v1"})
    ask = inference_pb2.GenerateRequest(model="m", text="hi")
    for arm, status in (("control", steering_pb2.STATUS_NOT_REQUESTED), ("calm", steering_pb2.STATUS_APPLIED)):
        metadata = (("x-trimtab-user", UNITS[arm][0]),)
        steering = (await called.inference.Generate(ask, metadata=metadata)).steering
        assert (steering.status, steering.experiment) == (status, steering_pb2.ExperimentArm(key=KEY, arm=arm))
    assert called.service.replica.exposures.flush(10)
    health = await called.experiments.GetExperimentHealth(v1.GetExperimentRequest(key=KEY))
    assert (health.healthy, health.written_count) == (True, 2)
    assert [dict(arm.statuses) for arm in health.arms] == [{"applied": 1}, {"applied": 1}]
    results = await called.experiments.GetExperimentResults(v1.GetExperimentRequest(key=KEY))
    assert (dict(results.units), dict(results.verdicts)) == ({"control": 1, "calm": 1}, {"calm": v1.VERDICT_COLLECTING})
    assert not results.effects[0].HasField("low")
    (exposure, _) = called.service.replica.measurements.exposures(KEY, after="", limit=9)
    outcome = v1.Outcome(response_id=exposure["response_id"], name="harm", value=1)
    told = await called.experiments.RecordOutcomes(v1.RecordOutcomesRequest(outcomes=[outcome, outcome]))
    assert (told.recorded_count, told.duplicate_count, told.pending_count) == (1, 1, 0)


async def test_a_watch_tells_each_change_and_ends_with_the_experiment(called: Called) -> None:
    await called.create()
    seen = []

    async def watch() -> None:
        async for update in called.experiments.WatchExperiment(v1.WatchExperimentRequest(key=KEY)):
            seen.append(update.experiment.state)

    watching = asyncio.create_task(watch())
    for name in ("Start", "Kill", "Archive"):
        n = len(seen)
        while len(seen) == n:
            await asyncio.sleep(0.02)
        await called.change(name)
    await asyncio.wait_for(watching, 10)
    assert seen == [1, 2, 4, 5]


async def test_a_watch_ends_when_the_server_drains(called: Called) -> None:
    await called.create()
    stream = called.experiments.WatchExperiment(v1.WatchExperimentRequest(key=KEY))
    await stream.read()
    called.service.gate.drain.begun = True
    assert await asyncio.wait_for(stream.read(), 5) == grpc.aio.EOF


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("GetExperiment", v1.GetExperimentRequest(key="nowhere"), grpc.StatusCode.NOT_FOUND),
        ("PauseExperiment", v1.ChangeExperimentRequest(key=KEY, reason="x"), grpc.StatusCode.FAILED_PRECONDITION),
        ("StartExperiment", v1.ChangeExperimentRequest(key=KEY), grpc.StatusCode.INVALID_ARGUMENT),
        ("CreateExperiment", v1.CreateExperimentRequest(reason="x"), grpc.StatusCode.INVALID_ARGUMENT),
        ("CreateExperiment", v1.CreateExperimentRequest(definition=NAN, reason="x"), grpc.StatusCode.INVALID_ARGUMENT),
        ("RecordOutcomes", v1.RecordOutcomesRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        ("RecordOutcomes", v1.RecordOutcomesRequest(outcomes=[FAR]), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_what_cannot_be_done_is_said(called: Called, method: str, request_: Any, code: grpc.StatusCode) -> None:
    """A NaN in a definition, and a time after the year 9999, ended a call with INTERNAL."""
    await called.create()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(called.experiments, method)(request_)
    assert refused.value.code() == code
