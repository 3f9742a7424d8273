import logging
import re
from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from trimtab.server.keys.access import OPEN, ROUTES
from trimtab.server.keys.guard import Guard
from trimtab.server.keys.key import SCOPES, Key, Policy, Scope, make
from trimtab.server.keys.limits import Limits
from trimtab.server.keys.secret import Secret
from trimtab.server.service import current
from trimtab.server.service.edge import MAX_HEADER_BYTES, MAX_HEADERS, Edge
from trimtab.server.service.gate import Drain, Gate
from trimtab.server.service.metrics import Metrics

SECRET = Secret("s" * 32)
KEY = "0123456789abcdef"


def key(*scopes: Scope, **policy: Any) -> tuple[Key, str]:
    text, public = make()
    made = Key(public, "a test", SECRET.digest(text), frozenset(scopes), Policy(**policy), "", "me", None, None, None)
    return made, text


def client(
    operator_key: str | None = None,
    drain: Drain | None = None,
    keys: Iterable[Key] = (),
    most: int = 100,
    metrics: Metrics | None = None,
) -> TestClient:
    async def echo(request: Request) -> Response:
        return JSONResponse({"ours": request.state.request_id, "caller": current.caller.get().name})

    app = Starlette()
    for method, path in ROUTES:
        if method != "GRPC":
            app.add_route(path, echo, methods=[method])
    app.add_route("/v1/not/in/the/table", echo, methods=["GET", "POST"])
    guard = Guard(SECRET, operator_key=operator_key)
    guard.know(keys)
    gate = Gate(guard, Limits(most), drain or Drain())
    return TestClient(Edge(app, gate=gate, metrics=metrics or Metrics(CollectorRegistry())))


def filled(path: str) -> str:
    return re.sub(r"\{\w+\}", "x", path)


HTTP = [(method, path) for method, path in ROUTES if method != "GRPC"]


@pytest.mark.parametrize(("method", "path"), HTTP)
def test_each_route_opens_for_its_scopes_and_for_no_other(method: str, path: str) -> None:
    """The route × scope table, all of it: nothing, a wrong key, and a key of each scope alone."""
    scopes = ROUTES[method, path]
    made = {scope: key(scope) for scope in SCOPES}
    http = client(keys=[k for k, _ in made.values()])
    anonymous = http.request(method, filled(path)).status_code
    wrong = http.request(
        method, filled(path), headers={"authorization": f"Bearer {made['admin'][1][:-1]}x"}
    ).status_code
    assert (anonymous, wrong) == ((200, 200) if scopes == OPEN else (401, 401))
    for scope, (_, text) in made.items():
        status = http.request(method, filled(path), headers={"authorization": f"Bearer {text}"}).status_code
        assert status == (200 if scopes == OPEN or scope in scopes else 403), scope


def test_a_route_that_the_table_does_not_have_opens_for_nobody() -> None:
    """Even if the app behind would serve it."""
    response = client(KEY).get("/v1/not/in/the/table", headers={"authorization": f"Bearer {KEY}"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert client(KEY).get("/v1/not/in/the/table").status_code == 401
    assert client().post("/v1/not/in/the/table").status_code == 404


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "/v1/models/", "/V1/models", "/livez/x"])
def test_a_path_spelt_otherwise_is_another_path(path: str) -> None:
    assert client(KEY).get(path).status_code == 401


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nowhere"])
@pytest.mark.parametrize("header", ["", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}0", f"Bearer {KEY[:-1]}"])
def test_without_the_key_nothing_but_the_probes_answers(path: str, header: str) -> None:
    response = client(KEY).get(path, headers={"authorization": header})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_with_the_key_all_routes_answer() -> None:
    response = client(KEY).get("/metrics", headers={"authorization": f"Bearer {KEY}"})
    assert (response.status_code, response.json()["caller"]) == (200, "operator")


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz"])
def test_probes_need_no_key(path: str) -> None:
    assert client(KEY).get(path).status_code == 200


def test_headers_are_bounded_before_anything_reads_them() -> None:
    http = client()
    many = {f"x-{i}": "y" for i in range(MAX_HEADERS)}
    for headers in (many, {"x-long": "y" * MAX_HEADER_BYTES}):
        response = http.get("/v1/models", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")
    assert http.get("/v1/models?" + "x" * MAX_HEADER_BYTES).status_code == 431


def test_a_keys_quota_is_a_429_that_says_when_to_come_back() -> None:
    made, text = key("infer", requests_per_minute=2)
    http = client(keys=[made])
    headers = {"authorization": f"Bearer {text}"}
    replies = [http.post("/v1/completions", headers=headers) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert (replies[2].json()["error"]["code"], replies[2].json()["error"]["type"]) == (
        "rate_limited",
        "rate_limit_error",
    )
    assert 1 <= int(replies[2].headers["retry-after"]) <= 61
    assert http.get("/v1/models", headers=headers).status_code == 200


def test_a_clients_request_id_is_echoed_and_not_used() -> None:
    response = client().get("/livez", headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["ours"] != "mine"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129])
def test_an_odd_request_id_is_replaced_by_ours(given: str) -> None:
    response = client().get("/livez", headers={"x-request-id": given})
    assert response.headers["x-request-id"] == response.json()["ours"]


def test_two_requests_never_share_an_id() -> None:
    c = client()
    ids = {c.get("/livez", headers={"x-request-id": "same"}).json()["ours"] for _ in range(20)}
    assert len(ids) == 20


def test_a_draining_server_takes_no_new_work_and_still_answers_probes() -> None:
    drain = Drain()
    drain.begun = True
    refused = client(drain=drain).post("/v1/completions")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert client(drain=drain).get("/livez").status_code == 200


def test_each_request_is_one_record_of_the_log_and_says_nothing_of_its_body(caplog: pytest.LogCaptureFixture) -> None:
    made, text = key("infer")
    with caplog.at_level("INFO", logger="trimtab"):
        logging.getLogger("trimtab").propagate = True
        headers = {"authorization": f"Bearer {text}"}
        client(keys=[made]).post("/v1/completions?prompt=sesame", json={"prompt": "open sesame"}, headers=headers)
        client(keys=[made]).get("/livez")
    (record,) = [record.__dict__ for record in caplog.records]
    assert (record["route"], record["status"], record["caller"]) == ("POST /v1/completions", 200, f"key:{made.id}")
    assert len(record["request_id"]) == 32
    assert "sesame" not in repr(record)
    assert text not in repr(record)


def test_metrics_have_a_bounded_number_of_routes_whatever_is_asked() -> None:
    registry = CollectorRegistry()
    http = client(metrics=Metrics(registry))
    for i in range(20):
        http.get(f"/nowhere/{i}")
        http.get(f"/admin/v1/bundles/calm:v{i}")
    count = registry.get_sample_value
    assert count("trimtab_rejected_total", {"code": "not_found"}) == 20
    labels = {"route": "/admin/v1/bundles/{reference}", "status": "2xx"}
    assert count("trimtab_request_seconds_count", labels) == 20
    assert count("trimtab_request_seconds_count", {"route": "none", "status": "4xx"}) == 20


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]:8000", 200),
        ("https://example.org", 403),
        ("http://localhost.example.org", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_a_web_page_of_elsewhere_does_not_administer_a_server_without_keys(origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"origin": origin}
    assert client().post("/admin/v1/bundles/calm:v1/promote", headers=headers).status_code == status
    with_key = headers | {"authorization": f"Bearer {KEY}"}
    assert client(KEY).post("/admin/v1/bundles/calm:v1/promote", headers=with_key).status_code == 200
    assert client().get("/livez", headers=headers).status_code == 200


async def test_a_client_that_goes_before_its_body_is_read_is_no_error() -> None:
    """It was a traceback in the log, and an alarm."""
    read, sent = [], []

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        read.append(await Request(scope, receive).body())

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    http = client()
    edge = Edge(reads, gate=http.app._gate, metrics=Metrics(CollectorRegistry()))  # type: ignore[attr-defined]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await edge(scope, receive, send)
    assert read == sent == []
