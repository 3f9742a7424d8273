"""The service's own series; vLLM's stand beside them in the same registry."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["STATUSES", "Metrics"]

STATUSES = (
    "applied", "not_requested", "killed", "failed_open", "not_applied", "refused", "failed", "ended", "abandoned"
)  # fmt: skip
"""How a generation request can end; `refused` is a 4xx, `failed` any other error, `ended` by a revocation or the kill switch,
`abandoned` a client that went away."""


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
