"""What the log and the metrics say of one request or call, whatever its transport."""

import logging
import time

from trimtab.server.service.metrics import Metrics

__all__ = ["Served"]

_QUIET = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
log = logging.getLogger("trimtab")


class Served:
    """One request, from its first byte on; `finish` writes it down."""

    def __init__(self, method: str, route: str) -> None:
        self._method = method
        self._route = route
        self._start = time.perf_counter()
        self.caller: str | None = None
        self.status = 0
        """That of HTTP; a call over gRPC has the one that its error would have there."""
        self.told: dict[str, str] = {}
        """How the reply was steered, as far as its beginning tells: `steering`, `plan`, `experiment`."""

    def finish(self, metrics: Metrics, request_id: str) -> None:
        """It has ended."""
        seconds = time.perf_counter() - self._start
        metrics.request_seconds.labels(self._route, f"{self.status // 100}xx").observe(seconds)
        route = f"{self._method} {self._route}"
        record = {"route": route, "status": self.status, "seconds": round(seconds, 4), "caller": self.caller}
        log.log(self._level, "request", extra=record | self.told | {"request_id": request_id})

    @property
    def _level(self) -> int:
        """Probes, and whoever reads metrics, come every few seconds."""
        return logging.DEBUG if self._route in _QUIET and self.status < 400 else logging.INFO
