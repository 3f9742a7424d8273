"""What the client asks of experiments and outcomes, and what it makes of the answers."""

import inspect
import json
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from tests.client import experiment_documents as documents
from trimtab.client import (
    AsyncTrimtab,
    ConflictError,
    ExperimentStateError,
    InvalidExperimentError,
    Outcome,
    StaleRevisionError,
    Trimtab,
    TrimtabError,
    UnknownExperimentError,
    UnsupportedError,
    aio_experiments,
    experiment_routes,
)

DEFINITION = documents.EXPERIMENT["definition"]
ROOT = "/admin/v1/experiments/calm-replies"
ANSWERS: dict[str, Any] = {
    "/admin/v1/experiments": {"object": "list", "data": [documents.EXPERIMENT]},
    f"{ROOT}/health": documents.HEALTH,
    f"{ROOT}/results": documents.RESULTS,
    f"{ROOT}/looks": documents.LOOKS,
    "/admin/v1/holdout": {"share": 0.05},
    "/v1/outcomes": {"recorded": 2, "duplicate": 1, "pending": 0},
}


class Scripted:
    """A server that answers about one experiment, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.failure: tuple[int, str] | None = None

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path, query = request.url.path, dict(request.url.params)
        self.asked.append((request.method, path, json.loads(request.content) if request.content else query or None))
        if self.failure is not None:
            status, code = self.failure
            violations = [{"field": "experiment.arms", "message": "weights must sum to 1"}]
            error = {"message": "no", "code": code, "param": None, "violations": violations}
            return httpx2.Response(status, json={"error": error}, headers={"x-should-retry": "false"})
        if path.endswith("/exposures"):
            rows = documents.EXPOSURES if query["after"] == "" else documents.EXPOSURES[:1]
            more = {"x-next-after": rows[-1]["response_id"]} if query["after"] == "" else {}
            return httpx2.Response(200, text="".join(json.dumps(row) + "\n" for row in rows), headers=more)
        if path.endswith("/texts"):
            return httpx2.Response(200, text="".join(json.dumps(row) + "\n" for row in documents.TEXTS))
        if request.method == "POST" and path.startswith("/admin"):
            return httpx2.Response(200, json=documents.EXPERIMENT)
        return httpx2.Response(200, json=ANSWERS.get(path, documents.EXPERIMENT))

    def client(self) -> Trimtab:
        return Trimtab("http://fake/v1", http_client=httpx2.Client(transport=httpx2.MockTransport(self)))


@pytest.fixture
def server() -> Scripted:
    return Scripted()


def test_an_experiment_is_created_and_moved_with_a_reason(server: Scripted) -> None:
    with server.client() as client:
        made = client.experiments.create(DEFINITION, reason="new")
        client.experiments.start("calm-replies", reason="go", revision=1)
        client.experiments.ramp("calm-replies", 0.5, reason="more")
        client.experiments.kill("calm-replies", reason="harm")
        client.experiments.purge("calm-replies", reason="a year is over")
    assert server.asked == [
        ("POST", "/admin/v1/experiments", {"definition": DEFINITION, "reason": "new"}),
        ("POST", f"{ROOT}/start", {"reason": "go", "revision": 1}),
        ("POST", f"{ROOT}/ramp", {"reason": "more", "coverage": 0.5}),
        ("POST", f"{ROOT}/kill", {"reason": "harm"}),
        ("POST", f"{ROOT}/purge", {"reason": "a year is over"}),
    ]
    assert (made.key, made.state, made.plans["calm"]) == ("calm-replies", "running", "sha256:00")
    assert made.started_at == datetime(2026, 11, 25, 12, tzinfo=UTC)
    assert [change.action for change in made.history] == ["create", "start"]


def test_health_and_results_are_typed(server: Scripted) -> None:
    with server.client() as client:
        health, results = client.experiments.health("calm-replies"), client.experiments.results("calm-replies")
        looks = client.experiments.looks("calm-replies", n_looks=10)
    assert (health.healthy, health.dropped, health.arms[1].statuses["failed"]) == (False, 3, 1)
    assert health.next_step is not None
    assert health.next_step.waits_for == ("hold", "health")
    assert results.verdicts == {"calm": "better", "prompt": "collecting"}
    assert (results.effect("calm").low, results.effect("prompt").low) == (-0.2, None)
    assert results.effect("calm", population="triggered").n_control == 500
    assert [rail.state for rail in results.guardrails] == ["safe", "collecting"]
    assert results.document == documents.RESULTS
    assert (looks[-1].units["control"], looks[0].effects[0].low) == (500, None)
    assert server.asked[-1] == ("GET", f"{ROOT}/looks", {"count": "10"})
    with pytest.raises(KeyError):
        results.effect("clam")


def test_exposures_are_read_page_by_page(server: Scripted) -> None:
    with server.client() as client:
        rows = list(client.experiments.exposures("calm-replies"))
    assert rows == [*documents.EXPOSURES, documents.EXPOSURES[0]]
    assert [asked[2]["after"] for asked in server.asked] == ["", f"{2:032x}"]


def test_sampled_texts_are_read_in_smaller_pages(server: Scripted) -> None:
    with server.client() as client:
        assert list(client.experiments.texts("calm-replies")) == documents.TEXTS
    assert server.asked == [("GET", f"{ROOT}/texts", {"after": "", "limit": "1000"})]


def test_an_outcome_is_told_of_a_reply_of_its_id_and_of_a_unit(server: Scripted) -> None:
    class Reply:
        id = "chatcmpl-1"

    at = datetime(2026, 11, 20, tzinfo=UTC)
    with server.client() as client:
        client.outcomes.record(Reply(), "harm", 1, event="judge-2")
        client.outcomes.record("chatcmpl-1", "harm", 1)
        told = client.outcomes.record_all([Outcome("before", 0.2, unit={"user": "u-17"}, at=at)])
        with pytest.raises(ValueError, match="no reply"):
            client.outcomes.record(object(), "harm", 1)
        with pytest.raises(ValueError, match="no zone"):
            client.outcomes.record_all([Outcome("x", 1, response="chatcmpl-1", at=datetime(2026, 1, 1))])
    assert [asked[2]["outcomes"][0] for asked in server.asked] == [
        {"response_id": "chatcmpl-1", "name": "harm", "value": 1, "event": "judge-2"},
        {"response_id": "chatcmpl-1", "name": "harm", "value": 1},
        {"unit": {"user": "u-17"}, "name": "before", "value": 0.2, "at": "2026-11-20T00:00:00+00:00"},
    ]
    assert (told.recorded, told.duplicate, told.pending) == (2, 1, 0)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_experiment", InvalidExperimentError),
        (404, "unknown_experiment", UnknownExperimentError),
        (409, "experiment_state", ExperimentStateError),
        (409, "stale_revision", StaleRevisionError),
        (409, "conflict", ConflictError),
    ],
)
def test_refusals_are_typed_and_list_every_violation(
    server: Scripted, status: int, code: str, kind: type[TrimtabError]
) -> None:
    server.failure = status, code
    with server.client() as client, pytest.raises(kind) as caught:
        client.experiments.create(DEFINITION, reason="new")
    assert caught.value.violations[0].field == "experiment.arms"
    assert len(server.asked) == 1


def test_an_answer_of_another_release_is_an_error(server: Scripted) -> None:
    with server.client() as client, pytest.raises(TrimtabError, match="cannot be read"):
        client.experiments.health("other")


def test_over_grpc_the_http_address_is_asked_for() -> None:
    with Trimtab("grpc://127.0.0.1:9") as client, pytest.raises(UnsupportedError, match="HTTP address"):
        client.experiments.list()


async def test_the_async_client_asks_the_same(server: Scripted) -> None:
    handler = httpx2.AsyncClient(transport=httpx2.MockTransport(server))
    async with AsyncTrimtab("http://fake", http_client=handler) as client:
        assert (await client.experiments.results("calm-replies")).power == 0.91
        assert [row async for row in client.experiments.exposures("calm-replies")][-1] == documents.EXPOSURES[0]
        assert await client.experiments.hold_out(0.05, reason="as agreed") == 0.05
        assert (await client.outcomes.record("chatcmpl-1", "harm", 0)).recorded == 2
    assert server.asked[-2] == ("PUT", "/admin/v1/holdout", {"share": 0.05, "reason": "as agreed"})


@pytest.mark.parametrize("name", ["ExperimentRoutes", "OutcomeRoutes"])
def test_sync_and_async_have_the_same_methods(name: str) -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        public = {n: f for n, f in inspect.getmembers(kind, inspect.isfunction) if not n.startswith("_")}
        return {n: list(inspect.signature(f).parameters) for n, f in public.items()}

    assert methods(getattr(experiment_routes, name)) == methods(getattr(aio_experiments, f"Async{name}"))
