"""The gate of every transport: who calls, whether the route is theirs, and whether there is a place for the request.

Default deny: a route that the table of `keys.access` does not have is refused, whatever the app behind would make of it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from trimtab.server.errors import Draining
from trimtab.server.keys.access import OPEN, is_generation, scopes_for
from trimtab.server.keys.guard import Guard
from trimtab.server.keys.key import ANONYMOUS, Caller
from trimtab.server.keys.limits import Limits
from trimtab.server.service import current

__all__ = ["Drain", "Gate", "UnknownRoute"]

_WORK = frozenset({"POST", "PUT", "DELETE", "GRPC"})


class UnknownRoute(Exception):
    """The table of routes does not have it."""


class Drain:
    """A server on its way out: it refuses new work, says that it is not ready, and waits for what it has taken on."""

    def __init__(self) -> None:
        self.begun = False
        self.n_active = 0
        """Requests other than GET that are being served."""


class Gate:
    """Lets requests in; `method` is HTTP's, or GRPC."""

    def __init__(self, guard: Guard, limits: Limits, drain: Drain) -> None:
        self._guard = guard
        self._limits = limits
        self.drain = drain

    def caller(self, method: str, path: str, authorization: str) -> Caller:
        """Who calls, and may.

        Raises:
            UnknownRoute: the route is not in the table; only a caller who has a key is told so.
            Unauthenticated: no valid key.
            Forbidden: the key has no scope that opens the route.
        """
        scopes = scopes_for(method, path)
        if scopes == OPEN:
            return _PROBE
        caller = self._guard.caller(authorization)
        if scopes is None:
            raise UnknownRoute(path)
        caller.require(scopes)
        return caller

    @contextmanager
    def inside(
        self, method: str, path: str, caller: Caller, request_id: str, headers: Mapping[str, str]
    ) -> Iterator[None]:
        """The request is served inside this; its caller, id and headers are known to whatever runs there.

        Raises:
            Draining: the server takes on no new work.
            RateLimited, Overloaded: there is no place for it.
        """
        is_work = method in _WORK
        if self.drain.begun and is_work:
            raise Draining("this server is shutting down; ask another replica")
        # Every request has a task of its own, and so a context: there is nothing to reset.
        current.caller.set(caller)
        current.request_id.set(request_id)
        current.headers.set(headers)
        self.drain.n_active += is_work
        try:
            if is_generation(method, path):
                with self._limits.place(caller):
                    yield
            else:
                yield
        finally:
            self.drain.n_active -= is_work


_PROBE = Caller(ANONYMOUS.name, frozenset(), ANONYMOUS.policy)
"""Whoever asks an open route: nobody, with no scope."""
