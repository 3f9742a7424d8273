"""The limits: what each key may ask for per minute and at once (429), and what the server takes on at all (503).

Counted in this replica: behind a balancer a key may use as much on each. The count per minute is a sliding window.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from time import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from trimtab.server.errors import Overloaded, RateLimited
from trimtab.server.keys.key import Caller

__all__ = ["Limits"]


class Limits:
    """Counts generation requests; `most` of them are taken on at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    @property
    def n_running(self) -> int:
        """Requests that hold a place."""
        return self._running.total()

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """A place for one request.

        Raises:
            RateLimited: the caller's own quota is used up.
            Overloaded: the server is full.
        """
        policy = caller.policy
        if policy.concurrent_requests is not None and self._running[caller.name] >= policy.concurrent_requests:
            raise RateLimited(
                f"{caller.name} may have {policy.concurrent_requests} requests at a time; wait for one to end",
                retry_after_seconds=1,
            )
        if self.n_running >= self._most:
            raise Overloaded(f"the server has {self._most} requests in hand, which is all it takes on; ask again later")
        if policy.requests_per_minute is not None:
            item = RateLimitItemPerMinute(policy.requests_per_minute)
            if not self._window.hit(item, caller.name):
                wait = max(1.0, self._window.get_window_stats(item, caller.name).reset_time - time())
                raise RateLimited(
                    f"{caller.name} may ask {policy.requests_per_minute} times a minute; ask again in {ceil(wait)} s",
                    retry_after_seconds=wait,
                )
        self._running[caller.name] += 1
        try:
            yield
        finally:
            self._running[caller.name] -= 1
            if not self._running[caller.name]:
                del self._running[caller.name]
