"""Keys, draining and TLS of the gRPC port, over a scripted engine; and TLS of the HTTP port beside it."""

import asyncio
import contextlib
import logging
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from tests.bundles import random_bundle
from tests.server.service.fakes import NoReplica, ScriptedEngine, ScriptedServing, gate
from trimtab.server.errors import Unsupported
from trimtab.server.keys.access import OPEN, ROUTES
from trimtab.server.keys.key import SCOPES, Key, Policy, Scope, make
from trimtab.server.keys.secret import Secret
from trimtab.server.service.app import build
from trimtab.server.service.gate import Drain
from trimtab.server.service.generation import Generation
from trimtab.server.service.launch import _server
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.preflight import TLS
from trimtab.server.service.rpc.server import RPC
from trimtab.v1 import inference_pb2 as v1
from trimtab.v1 import steering_pb2 as words
from trimtab.v1.inference_pb2_grpc import InferenceServiceStub

KEY = "a-key-for-the-tests-of-grpc"
SECRET = Secret("s" * 32)


def key_of(*scopes: Scope) -> tuple[Key, str]:
    text, public = make()
    return Key(public, "a test", SECRET.digest(text), frozenset(scopes), Policy(), "", "me", None, None, None), text


ASK = v1.GenerateRequest(model="m", text="hi")
NONE = cast(Any, None)


def generation(engine: ScriptedEngine, registry: CollectorRegistry | None = None) -> Generation:
    serving = cast(Any, ScriptedServing(engine))
    return Generation(
        engine=cast(Any, engine),
        chat=serving,
        completion=serving,
        responses=serving,
        models=("m",),
        bundles={"calm": random_bundle()},
        on_failure="closed",
        metrics=Metrics(registry or CollectorRegistry()),
        keep_alive_seconds=0.0,
    )


@asynccontextmanager
async def serving(
    *, key: str | None = None, tls: TLS | None = None, drain: Drain | None = None, engine: Any = None
) -> AsyncIterator[str]:
    """The address of a running gRPC server."""
    rpc = RPC(generation(engine or ScriptedEngine()), NONE, NONE, gate(key, drain), cast(Any, NoReplica()))
    port = await rpc.start("127.0.0.1", 0, tls)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await rpc.stop()


async def code(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_without_its_key_a_server_answers_probes_alone() -> None:
    async with serving(key=KEY) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = InferenceServiceStub(channel)
        assert await code(stub.Generate(ASK)) == grpc.StatusCode.UNAUTHENTICATED
        wrong = (("authorization", "Bearer another-key-that-is-long"),)
        assert await code(stub.Generate(ASK, metadata=wrong)) == grpc.StatusCode.UNAUTHENTICATED
        assert await code(stub.StreamGenerate(ASK).read()) == grpc.StatusCode.UNAUTHENTICATED
        right = (("authorization", f"Bearer {KEY}"),)
        assert (await stub.Generate(ASK, metadata=right)).completions[0].text == "so it goes"
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("method", [path for method, path in ROUTES if method == "GRPC"])
async def test_each_method_opens_for_its_scopes_and_for_no_other(method: str) -> None:
    """The gRPC half of the route × scope table: nothing, a wrong key, and a key of each scope alone."""
    made = {scope: key_of(scope) for scope in SCOPES}
    rpc = RPC(generation(ScriptedEngine()), NONE, NONE, gate(keys=[key for key, _ in made.values()]), NONE)
    port = await rpc.start("127.0.0.1", 0, None)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        # Bytes that are no message: whoever is let in is told so, by whatever code.
        call: Any = channel.unary_unary(method, request_serializer=None, response_deserializer=None)

        async def outcome(text: str | None) -> str:
            metadata = () if text is None else (("authorization", f"Bearer {text}"),)
            try:
                await call(b"\xff", metadata=metadata, timeout=5)
            except grpc.aio.AioRpcError as e:
                name = e.code().name
                return name if name in ("UNAUTHENTICATED", "PERMISSION_DENIED") else "in"
            return "in"

        scopes = ROUTES["GRPC", method]
        stranger = "in" if scopes == OPEN else "UNAUTHENTICATED"
        assert [await outcome(None), await outcome(made["admin"][1][:-1] + "x")] == [stranger, stranger]
        for scope, (_, text) in made.items():
            expected = "in" if scopes == OPEN or scope in scopes else "PERMISSION_DENIED"
            assert await outcome(text) == expected, scope
    await rpc.stop()


async def test_a_draining_server_takes_no_new_call_and_its_health_says_so() -> None:
    drain = Drain()
    drain.begun = True
    async with serving(drain=drain) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = InferenceServiceStub(channel)
        assert await code(stub.Generate(ASK)) == grpc.StatusCode.UNAVAILABLE
        assert drain.n_active == 0


async def test_a_reply_that_was_not_steered_as_asked_is_withheld() -> None:
    edit = words.Edit(bundle="calm", latent=7, operation=words.OPERATION_ADD, amount=1.0)
    steered = v1.GenerateRequest(model="m", text="hi", steering=words.Steering(free_form=words.Edits(edits=[edit])))
    async with serving() as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="no proof") as caught:
            await stub.Generate(steered)
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        stream, seen = stub.StreamGenerate(steered), []
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for piece in stream:
                seen.append(piece)
        assert (await stream.code(), len(seen)) == (grpc.StatusCode.INTERNAL, 2)
        assert all(not completion.finish_reason for piece in seen for completion in piece.completions)
        steered.steering.on_failure = words.ON_FAILURE_OPEN
        assert (await stub.Generate(steered)).steering.status == words.STATUS_FAILED_OPEN


@pytest.mark.parametrize("method", [path for method, path in ROUTES if method == "GRPC" and "Health/List" not in path])
async def test_bytes_that_are_no_message_are_refused_and_the_log_has_no_traceback(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as address, grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_stream(method, request_serializer=None, response_deserializer=None)
        assert await code(call(b"\xff\xff", timeout=5).read()) == grpc.StatusCode.INVALID_ARGUMENT
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_each_call_is_one_record_of_the_log_and_one_observation(caplog: pytest.LogCaptureFixture) -> None:
    """Refused at the gate, refused by its content, served: all are written down, as requests over HTTP are."""
    engine, registry = ScriptedEngine(), CollectorRegistry()
    made = generation(engine, registry)
    rpc = RPC(made, NONE, NONE, gate(KEY), NONE)
    port = await rpc.start("127.0.0.1", 0, None)
    right = (("authorization", f"Bearer {KEY}"),)
    with caplog.at_level("INFO", logger="trimtab"):
        logging.getLogger("trimtab").propagate = True
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = InferenceServiceStub(channel)
            assert await code(stub.Generate(ASK)) == grpc.StatusCode.UNAUTHENTICATED
            assert (
                await code(stub.Generate(v1.GenerateRequest(model="m"), metadata=right))
                == grpc.StatusCode.INVALID_ARGUMENT
            )
            call = stub.Generate(ASK, metadata=right)
            await call
            named = dict(await call.trailing_metadata())["x-request-id"]
            async for _ in stub.StreamGenerate(ASK, metadata=right):
                pass
    await rpc.stop()
    route = "/trimtab.v1.InferenceService/Generate"
    records = [record.__dict__ for record in caplog.records if record.getMessage() == "request"]
    assert [(record["route"], record["status"], record["caller"]) for record in records] == [
        (f"GRPC {route}", 401, None),
        (f"GRPC {route}", 400, "operator"),
        (f"GRPC {route}", 200, "operator"),
        ("GRPC /trimtab.v1.InferenceService/StreamGenerate", 200, "operator"),
    ]
    assert (records[2]["request_id"], records[2]["steering"]) == (named, "not_requested")
    for status, n in (("4xx", 2), ("2xx", 1)):
        assert registry.get_sample_value("trimtab_request_seconds_count", {"route": route, "status": status}) == n
    assert registry.get_sample_value("trimtab_rejected_total", {"code": "invalid_api_key"}) == 1


async def test_an_error_of_the_server_tells_nothing_of_its_insides() -> None:
    engine = ScriptedEngine(error=RuntimeError("secret path"))
    async with serving(engine=engine) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ASK)
    assert "secret" not in str(rpc_status.from_call(cast(Any, caught.value)))


async def test_a_port_that_is_taken_is_refused() -> None:
    async with serving() as address:
        rpc = RPC(generation(ScriptedEngine()), NONE, NONE, gate(), NONE)
        with pytest.raises(Unsupported, match="cannot listen"):
            await rpc.start("127.0.0.1", int(address.rpartition(":")[2]), None)
        await rpc.stop()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and what it signed: `server` and `client`."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(*new, "-x509", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = (
            "x509",
            "-req",
            "-days",
            "2",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-extfile",
            "san",
        )
        openssl(*signed, "-in", f"{name}.csr", "-out", f"{name}.pem")
    return folder


def tls(files: Path, *, mutual: bool) -> TLS:
    found = TLS.of(files / "server.pem", files / "server.key", files / "ca.pem" if mutual else None)
    assert found is not None
    return found


async def test_grpc_over_tls(files: Path) -> None:
    trusted = grpc.ssl_channel_credentials((files / "ca.pem").read_bytes())
    async with serving(tls=tls(files, mutual=False)) as address:
        async with grpc.aio.secure_channel(address, trusted) as channel:
            stub: Any = InferenceServiceStub(channel)
            assert (await stub.Generate(ASK)).completions
        async with grpc.aio.insecure_channel(address) as channel:
            plain: Any = InferenceServiceStub(channel)
            assert await code(plain.Generate(ASK)) == grpc.StatusCode.UNAVAILABLE


async def test_grpc_over_mutual_tls(files: Path) -> None:
    ca, key, certificate = ((files / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem"))
    async with serving(tls=tls(files, mutual=True)) as address:
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate)) as channel:
            stub: Any = InferenceServiceStub(channel)
            assert (await stub.Generate(ASK)).completions
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
            unknown: Any = InferenceServiceStub(channel)
            assert await code(unknown.Generate(ASK)) == grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


@pytest.mark.parametrize("mutual", [False, True])
async def test_http_over_tls(files: Path, listening: socket.socket, mutual: bool) -> None:
    app = build(generation(ScriptedEngine()), NONE, NONE, NONE, CollectorRegistry(), cast(Any, NoReplica()), gate())
    server = _server(app, tls(files, mutual=mutual))
    running = asyncio.ensure_future(server.serve(sockets=[listening]))
    url = f"https://127.0.0.1:{listening.getsockname()[1]}/livez"
    while not server.started:
        await asyncio.sleep(0.01)
    context = ssl.create_default_context(cafile=files / "ca.pem")
    if mutual:
        async with httpx.AsyncClient(verify=context) as client:
            with pytest.raises(httpx.HTTPError):
                await client.get(url)
        context.load_cert_chain(files / "client.pem", files / "client.key")
    async with httpx.AsyncClient(verify=context) as client:
        assert (await client.get(url)).status_code == 200
    server.should_exit = True
    await running


@pytest.mark.parametrize(
    "given", [("server.pem", None, None), (None, None, "ca.pem"), ("server.pem", "client.key", None)]
)
def test_files_that_do_not_go_together_are_refused(files: Path, given: tuple[str | None, ...]) -> None:
    with pytest.raises(Unsupported):
        TLS.of(*(None if name is None else files / name for name in given))
    with pytest.raises(Unsupported, match="cannot be read"):
        TLS.of(files / "absent.pem", files / "server.key", None)
