import asyncio
import gzip
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.testclient import TestClient

from tests.server.service.fakes import ScriptedEngine, gate
from tests.server.service.rpc.test_server import generation
from tests.server.service.test_generation import STEERING, Service, proof
from trimtab.server.operations.tracing import provider, traced
from trimtab.server.service.rpc.server import RPC
from trimtab.v1 import inference_pb2 as v1
from trimtab.v1.inference_pb2_grpc import InferenceServiceStub

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


async def test_a_call_over_grpc_is_a_span_too(collector: tuple[str, list[Any]]) -> None:
    endpoint, spans = collector
    made = provider(endpoint)
    none: Any = None
    rpc = RPC(generation(ScriptedEngine()), none, none, gate(), none, made)
    port = await rpc.start("127.0.0.1", 0, None)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = InferenceServiceStub(channel)
        await stub.Generate(v1.GenerateRequest(model="m", text="open sesame"), metadata=(("traceparent", PARENT),))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(v1.GenerateRequest(model="m"))
    await rpc.stop()
    await asyncio.to_thread(made.shutdown)
    served, refused = spans
    told = {attribute.key: attribute.value for attribute in served.attributes}
    assert (served.name, served.trace_id.hex()) == ("trimtab.v1.InferenceService/Generate", PARENT[3:35])
    assert told["trimtab.steering.status"].string_value == "not_requested"
    assert (told["trimtab.caller"].string_value, told["trimtab.status"].int_value) == ("anonymous", 200)
    assert "sesame" not in str(served)
    assert {attribute.key: attribute.value for attribute in refused.attributes}["trimtab.status"].int_value == 400
