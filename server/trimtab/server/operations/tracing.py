"""Traces: a span for each HTTP request and each call over gRPC, to a collector; a caller's `traceparent` is its parent.

Beside what HTTP's conventions ask for a span tells the caller, our id of the request, and how the reply was steered. No text of a
request or a reply is in it, nor its query.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.server.errors import Unsupported
from trimtab.server.keys.access import route_of

__all__ = ["SERVICE", "Span", "call_span", "provider", "traced"]

SERVICE = "trimtab"
_TOLD = {b"x-steering-status": "trimtab.steering.status", b"x-steering-plan": "trimtab.steering.plan"}
_QUIET = "livez,readyz,startupz,metrics"


def provider(endpoint: str) -> Any:
    """What sends spans to the collector at `endpoint`, `http://HOST:4318`; shut it down to send the last ones.

    Raises:
        Unsupported: the packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation import asgi  # noqa: F401
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise Unsupported(f"traces need {e.name}: pip install 'trimtab[tracing]'") from e
    made = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    return made


def traced(app: ASGIApp, spans: Any) -> ASGIApp:
    """The app, with a span of `spans` around each request but probes."""
    from opentelemetry import trace
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    async def telling(scope: Scope, receive: Receive, send: Send) -> None:
        span = trace.get_current_span()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                _replied(span, scope, message)
            await send(message)

        await app(scope, receive, tell)

    made: ASGIApp = OpenTelemetryMiddleware(
        telling,
        excluded_urls=_QUIET,
        default_span_details=_details,
        tracer_provider=spans,
        exclude_spans=["receive", "send"],
    )
    return made


class Span(NamedTuple):
    """That of one call over gRPC."""

    span: Any

    def end(self, told: Mapping[str, str | int | None]) -> None:
        """The call has ended."""
        for name, value in told.items():
            if value is not None:
                self.span.set_attribute(f"trimtab.{name}", value)
        self.span.end()


def call_span(spans: Any, method: str, metadata: Iterable[tuple[str, Any]]) -> Span:
    """A span of `spans` for a call that begins, by its full method."""
    from opentelemetry import propagate, trace

    service, _, name = method.strip("/").partition("/")
    parent = propagate.extract({key: value for key, value in metadata if isinstance(value, str)})
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    tracer = spans.get_tracer(SERVICE)
    return Span(tracer.start_span(method.strip("/"), parent, trace.SpanKind.SERVER, attributes))


def _details(scope: Scope) -> tuple[str, dict[str, Any]]:
    route = route_of(scope["method"], scope["path"])
    # The query may hold anything, and the conventions would copy it.
    bare = {"http.url": scope["path"], "http.target": scope["path"], "url.query": ""}
    return f"{scope['method']} {route or 'none'}", bare | ({"http.route": route} if route else {})


def _replied(span: Any, scope: Scope, message: Message) -> None:
    state = scope.get("state", {})
    span.set_attribute("trimtab.request_id", state.get("request_id", ""))
    if (caller := state.get("caller")) is not None:
        span.set_attribute("trimtab.caller", caller.name)
    for name, value in message["headers"]:
        if name in _TOLD:
            span.set_attribute(_TOLD[name], value.decode())
