"""The server's life: start the engine, load and prove, serve, drain. A server that is not proven to steer does not start."""

import asyncio
import logging
import math
import signal
import ssl
import sys
import threading
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from multiprocessing import resource_tracker
from typing import Any

import uvicorn
import uvloop
from prometheus_client import REGISTRY
from starlette.datastructures import State
from starlette.types import ASGIApp
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.gc_utils import freeze_gc_heap

from trimtab.server.engine import pin
from trimtab.server.engine.handshake import prove
from trimtab.server.errors import Unsupported
from trimtab.server.operations import tracing
from trimtab.server.operations.logs import ENGINE_FLAGS
from trimtab.server.service import current, flags
from trimtab.server.service.app import build
from trimtab.server.service.flights import Flights
from trimtab.server.service.gate import Drain, Gate
from trimtab.server.service.generation import Generation
from trimtab.server.service.head import BoundedHead
from trimtab.server.service.inspect import Inspector
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.preflight import TLS, Preflight
from trimtab.server.service.replica import Replica
from trimtab.server.service.rpc.server import RPC
from trimtab.server.service.shelf import Shelf

__all__ = ["ENGINE_DIED", "INTERRUPTED", "run"]

ENGINE_DIED = 1
INTERRUPTED = 130
POLL_SECONDS = 0.2
IDLE_SECONDS = 75
"""An unused connection is kept longer than clients keep theirs for reuse (5 s in httpx, and so in the OpenAI SDK) and load
balancers (60 s in most): a request that meets the server's closing is lost, and a POST is not sent twice."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
log = logging.getLogger("trimtab")


def run(ready: Preflight) -> int:
    """The exit code of a server that ran until it was told to stop (0), or whose engine died (1).

    Raises:
        Unsupported: it does not start; the message says why and what to do.
    """
    settings = ready.settings
    pin.check()
    engine_flags = (*(ENGINE_FLAGS if settings.log_format == "json" else ()), *settings.engine_flags)
    args, chosen = flags.parse(engine_flags, model=ready.folder, served=settings.served_name)
    if chosen:
        ready.say(f"on this CPU: {', '.join(chosen)}")
    _load_parsers(args)
    cli_env_setup()  # type: ignore[no-untyped-call]
    with _terminable():
        return uvloop.run(_serve(ready, args))


def _load_parsers(args: Namespace) -> None:
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    try:
        validate_api_server_args(args)  # type: ignore[no-untyped-call]
    except KeyError as e:
        raise Unsupported(f"engine flags: {e.args[0]}") from e


@contextmanager
def _terminable() -> Iterator[None]:
    """Until the server handles signals itself, they unwind the start, so that no engine process stays behind."""

    def interrupt(*_: Any) -> None:
        raise SystemExit(
            INTERRUPTED
        )  # KeyboardInterrupt is swallowed by vLLM's `zmq_socket_ctx`, which then waits forever.

    before = [(number, signal.signal(number, interrupt)) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextmanager
def _interrupt_is_ours() -> Iterator[None]:
    """Processes started here never see SIGINT: ^C in a terminal goes to all of a job, and would kill a worker under its streams.

    They inherit this thread's blocked signals; another thread takes the signal for us meanwhile.
    """
    resource_tracker.ensure_running()  # It unblocks SIGINT when it starts.
    done = threading.Event()
    threading.Thread(target=done.wait, name="sigint", daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()


async def _serve(ready: Preflight, args: Namespace) -> int:
    settings = ready.settings
    async with _engine(args) as engine, AsyncExitStack() as stack:
        metrics, flights = Metrics(REGISTRY), Flights()
        shelf = Shelf(engine, ready.identity, metrics, flights, mutable=settings.allow_bundle_upload)
        stack.push_async_callback(shelf.close)
        for bundle in ready.bundles.values():
            await shelf.add(bundle, pin=True)
        replica = Replica(
            ready.database,
            shelf,
            flights,
            fingerprint=ready.identity.fingerprint,
            secret=ready.secret,
            operator_key=settings.operator_key,
            signatures=ready.signatures,
            max_requests=settings.max_requests,
            poll_seconds=settings.poll_seconds,
            stale_after_seconds=settings.stale_after_seconds,
            experiment_seconds=settings.experiment_seconds,
            purge_after_days=settings.purge_after_days,
            graders=ready.graders,
            assigner=ready.assigner,
        )
        stack.push_async_callback(replica.close)
        await replica.start()
        drain = Drain()
        gate = Gate(replica.guard, replica.limits, drain)
        reports = await prove(engine, [bundle.content_hash for bundle in shelf.values()])
        state = State()
        await init_app_state(engine, state, args, await engine.get_supported_tasks())
        serving = (state.openai_serving_chat, state.openai_serving_completion, state.openai_serving_responses)
        if None in serving:
            raise Unsupported(f"{settings.model} does not generate text; serve a decoder")
        generation = Generation(
            engine=engine,
            chat=state.openai_serving_chat,
            completion=state.openai_serving_completion,
            responses=state.openai_serving_responses,
            models=(settings.served_name, *state.openai_serving_models.lora_requests),
            bundles=replica.catalogue,
            on_failure=settings.on_failure,
            metrics=metrics,
            keep_alive_seconds=float(args.sse_keep_alive_interval),
            rules=lambda: replica.rules(current.caller.get()),
            flights=flights,
            experiments=replica.enroller(metrics),
        )
        models, tokenization = state.openai_serving_models, state.serving_tokenization
        app = build(generation, shelf, models, tokenization, REGISTRY, replica, gate)
        inspector = Inspector(generation, tokenization)
        spans = None if settings.otlp_endpoint is None else tracing.provider(settings.otlp_endpoint)
        if spans is not None:
            stack.callback(spans.shutdown)
        rpc = None
        if settings.grpc_port is not None:
            rpc = RPC(generation, shelf, inspector, gate, replica, spans)
        server = _server(app if spans is None else tracing.traced(app, spans), ready.tls)
        n_layers = len({layer for report in reports for layer in report["layers"]})
        ready.say(
            f"{len(reports)} worker(s) proven: hooks on {n_layers} layers; bundles: {', '.join(sorted(shelf)) or 'none'}"
        )
        freeze_gc_heap()  # as vLLM's own server does: the collector walks 750,000 objects of the start, for tenths of a second
        return await _until_stopped(server, rpc, engine, drain, ready, args.shutdown_timeout)


@asynccontextmanager
async def _engine(args: Namespace) -> AsyncIterator[EngineClient]:
    """A running engine; whatever happens, its processes are gone afterwards."""
    async with AsyncExitStack() as stack:
        try:
            with _interrupt_is_ours():
                engine = await stack.enter_async_context(build_async_engine_client(args))
        except RuntimeError as e:
            if "Engine core initialization failed" not in str(e):
                raise
            raise Unsupported("the engine did not start; its own log above says why") from e
        yield engine


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would raise the signal again after a clean shutdown."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: ASGIApp, tls: TLS | None) -> _Server:
    config = uvicorn.Config(
        app,
        http=BoundedHead,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=1,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else str(tls.key),
        ssl_ca_certs=None if tls is None or tls.client_ca is None else str(tls.client_ca),
        ssl_cert_reqs=ssl.CERT_NONE if tls is None or tls.client_ca is None else ssl.CERT_REQUIRED,
    )
    return _Server(config)


async def _until_stopped(
    server: _Server, rpc: RPC | None, engine: EngineClient, drain: Drain, ready: Preflight, drain_seconds: float
) -> int:
    settings, sock = ready.settings, ready.sock
    loop = asyncio.get_running_loop()
    deadline = math.inf

    def stop() -> None:
        nonlocal deadline
        # The first signal lets streams finish, a second one does not.
        deadline = 0.0 if drain.begun else loop.time() + drain_seconds
        drain.begun = True

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    host, port = sock.getsockname()[:2]
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    shown = f"[{host}]" if ":" in host else host
    if rpc is not None:
        bound = await rpc.start(host, settings.grpc_port or 0, ready.tls)
        ready.say(f"serving gRPC on {shown}:{bound}")
    scheme = "http" if ready.tls is None else "https"
    ready.say(f"serving {settings.served_name} on {scheme}://{shown}:{port}")
    died = False
    while not serving.done():
        await asyncio.wait((serving,), timeout=POLL_SECONDS)
        if drain.begun and rpc is not None:
            await rpc.not_serving()
        if drain.begun and (not drain.n_active or loop.time() > deadline):
            server.should_exit = True
        if engine.errored and not died:
            died = server.should_exit = True
            log.error("the engine has stopped; so does this server")
    await serving
    if rpc is not None:
        await rpc.stop()
    for number in STOP_SIGNALS:
        loop.remove_signal_handler(number)
    sys.stderr.flush()
    return ENGINE_DIED if died else 0
