"""The service's own series; vLLM's stand beside them in the same registry."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["REJECTED", "STATUSES", "Metrics"]

STATUSES = (
    "applied", "not_requested", "killed", "failed_open", "not_applied", "refused", "failed", "ended", "abandoned"
)  # fmt: skip
"""How a generation request can end; `refused` is a 4xx, `failed` any other error, `ended` by a revocation or the kill switch,
`abandoned` a client that went away."""


REJECTED = (
    "invalid_api_key", "forbidden", "not_found", "method_not_allowed", "headers_too_large",
    "invalid_request", "rate_limited", "overloaded", "draining",
)  # fmt: skip
# Those of vLLM's own `e2e_request_latency_seconds`, so that dashboards overlay, and two below for what runs no model.
_SECONDS = (
    0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class Metrics:
    """Counters of one server, in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "trimtab_requests", "Generation requests, by how they ended.", ["status"], registry=registry
        )
        self.mismatches = Counter(
            "trimtab_steering_mismatch", "Replies whose proof did not match their plan. Must stay 0.", registry=registry
        )
        self.edited_tokens = Counter(
            "trimtab_edited_tokens", "Tokens edited, as proven by the engine.", ["scope"], registry=registry
        )
        self.admission_seconds = Histogram(
            "trimtab_admission_seconds",
            "From a whole body to a request for vLLM: parsing, validation, the plan.",
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0),
            registry=registry,
        )
        self.bundles_loaded = Gauge("trimtab_bundles_loaded", "Bundles that requests can name.", registry=registry)
        self.request_seconds = Histogram(
            "trimtab_request_seconds",
            "From a request's first byte to its reply's last, by route and class of status.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "trimtab_rejected",
            "Requests turned away before they were served, by the error's code.",
            ["code"],
            registry=registry,
        )
        self.running = Gauge(
            "trimtab_requests_running", "Generation requests in hand, waiting ones too.", registry=registry
        )
        self.killed = Gauge("trimtab_kill_switch", "1 while the kill switch is thrown.", registry=registry)
        self.database_silence = Gauge(
            "trimtab_database_silence_seconds", "Since the database last answered this replica.", registry=registry
        )
        self.sequence = Gauge(
            "trimtab_database_change", "Number of the last change that this replica goes by.", registry=registry
        )
        self.not_loaded = Gauge(
            "trimtab_bundles_not_loaded", "Active versions that could not be loaded here.", registry=registry
        )
        self.experiment_requests = Counter(
            "trimtab_experiment_requests",
            "Requests of an experiment's arms, by how they ended.",
            ["experiment", "arm", "status"],
            registry=registry,
        )
        self.experiment_decisions = Counter(
            "trimtab_experiment_decisions",
            "Requests while an experiment ran, by what was decided: assigned, forced, or why not.",
            ["experiment", "reason"],
            registry=registry,
        )
        self.exposures_dropped = Counter(
            "trimtab_exposures_dropped",
            "Exposures that were lost because the database did not take them in time. Must stay 0.",
            ["experiment"],
            registry=registry,
        )
        self.exposures_waiting = Gauge(
            "trimtab_exposures_waiting", "Exposures that are not written yet.", registry=registry
        )
        for code in REJECTED:
            self.rejected.labels(code)
        for status in STATUSES:
            self.requests.labels(status)
        for scope in ("prompt", "completion", "cached_prompt"):
            self.edited_tokens.labels(scope)

    @contextmanager
    def refusals(self, is_the_callers: Callable[[Exception], bool] = lambda _: True) -> Iterator[None]:
        """Count an exception before a request's run as a request that was refused, or that failed."""
        try:
            yield
        except Exception as e:
            self.requests.labels("refused" if is_the_callers(e) else "failed").inc()
            raise
