"""Requests under way that are steered, so that a revocation or the kill switch can end them, whatever the engine does.

    flight = flights.start(content hashes)          in the same step of the event loop as the admission
    await flight.whole(awaitable)                   raises the error with which it was ended
    flight.stream(events)                           … of a stream, at its next event

Ending does not wait: whoever waits for the engine is woken at once. It costs a running stream nothing: no timer, no extra task.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import TypeVar
from weakref import WeakSet

from trimtab.server.errors import TrimtabError

__all__ = ["Flight", "Flights"]

Result = TypeVar("Result")
Item = TypeVar("Item")


class Flight:
    """One request; it is under way while somebody holds this."""

    def __init__(self, bundles: Collection[str], experiment: str | None = None) -> None:
        self.bundles = frozenset(bundles)
        """Content hashes of what it is steered by."""
        self.experiment = experiment
        """The experiment whose arm alters it."""
        self.error: TrimtabError | None = None
        """Why it was ended."""
        self._waiting: asyncio.Task[object] | None = None

    def end(self, error: TrimtabError) -> None:
        """Ends it, unless it was ended before."""
        if self.error is None:
            self.error = error
            if self._waiting is not None:
                self._waiting.cancel()

    async def whole(self, result: Awaitable[Result]) -> Result:
        """The result.

        Raises:
            TrimtabError: it was ended.
        """
        task = asyncio.current_task()
        self._waiting = task
        try:
            found = await result
        except asyncio.CancelledError:
            # Somebody else may have cancelled too, such as a client that went away.
            if self.error is None or task is None or task.uncancel():
                raise
            raise self.error from None
        finally:
            self._waiting = None
        if self.error is not None:
            if task is not None:
                task.uncancel()  # Ours was answered with a result.
            raise self.error
        return found

    async def stream(self, events: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        """The events.

        Raises:
            TrimtabError: it was ended; no event follows.
        """
        async with aclosing(events):
            while True:
                if self.error is not None:
                    raise self.error
                try:
                    event = await self.whole(anext(events))
                except StopAsyncIteration:
                    if self.error is not None:
                        raise self.error from None
                    return
                yield event


class Flights:
    """All of them."""

    def __init__(self) -> None:
        self._flights: WeakSet[Flight] = WeakSet()

    def __len__(self) -> int:
        return len(self._flights)

    def start(self, bundles: Collection[str], experiment: str | None = None) -> Flight:
        """A request that is steered by bundles of these content hashes, or altered by an experiment."""
        flight = Flight(bundles, experiment)
        self._flights.add(flight)
        return flight

    def use(self, bundle: str) -> bool:
        """Whether one of them that was not ended is steered by the bundle of this content hash.

        One that was ended may outlive its request, for its error holds it until the collector comes by.
        """
        return any(bundle in flight.bundles for flight in list(self._flights) if flight.error is None)

    def end(self, error: Callable[[Flight], TrimtabError | None]) -> int:
        """How many were ended: those for which `error` has one."""
        ended = 0
        for flight in list(self._flights):
            if flight.error is None and (why := error(flight)) is not None:
                flight.end(why)
                ended += 1
        return ended
