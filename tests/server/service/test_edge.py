import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from trimtab.server.service.edge import Drain, Edge, digest


def client(key: str | None = None, drain: Drain | None = None) -> TestClient:
    async def echo(request: Request) -> Response:
        return JSONResponse({"ours": request.state.request_id})

    app = Starlette()
    for path in ("/v1/models", "/livez", "/readyz", "/metrics"):
        app.add_route(path, echo, methods=["GET", "POST"])
    return TestClient(Edge(app, key=None if key is None else digest(key), drain=drain or Drain()))


KEY = "0123456789abcdef"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nowhere"])
@pytest.mark.parametrize("header", ["", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}0", f"Bearer {KEY[:-1]}"])
def test_without_the_key_nothing_but_the_probes_answers(path: str, header: str) -> None:
    response = client(KEY).get(path, headers={"authorization": header})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_with_the_key_all_routes_answer() -> None:
    assert client(KEY).get("/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_need_no_key(path: str) -> None:
    assert client(KEY).get(path).status_code == 200


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
    refused = client(drain=drain).post("/v1/models")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert client(drain=drain).get("/livez").status_code == 200
