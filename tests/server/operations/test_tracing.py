import gzip
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.testclient import TestClient

from tests.server.service.fakes import ScriptedEngine
from tests.server.service.test_generation import STEERING, Service, proof
from trimtab.server.operations.tracing import provider, traced

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A collector's address, and the spans that it was sent."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            data = gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()
        thread.join()


def test_a_request_is_a_span_under_its_callers_and_holds_no_text(collector: tuple[str, list[Any]]) -> None:
    endpoint, spans = collector
    made = provider(endpoint)
    app: Any = Service(ScriptedEngine(proof())).http.app
    http = TestClient(traced(app, made), raise_server_exceptions=False)
    document = {"model": "m", "prompt": "open sesame", "steering": STEERING}
    reply = http.post("/v1/completions?secret=sesame", json=document, headers={"traceparent": PARENT})
    assert reply.status_code == 200
    http.get("/livez")
    http.get("/nowhere/sesame-street")
    made.shutdown()
    generation, nowhere = spans
    told = {attribute.key: attribute.value.string_value for attribute in generation.attributes}
    assert (generation.name, generation.trace_id.hex()) == ("POST /v1/completions", PARENT[3:35])
    assert generation.parent_span_id.hex() == PARENT[36:52]
    assert told["http.route"] == "/v1/completions"
    assert (told["trimtab.caller"], told["trimtab.steering.status"]) == ("anonymous", "applied")
    assert told["trimtab.steering.plan"] == reply.headers["x-steering-plan"]
    assert len(told["trimtab.request_id"]) == 32
    assert "sesame" not in str(generation)
    assert nowhere.name == "GET none"
