import asyncio
import gc
from collections.abc import AsyncGenerator

import pytest

from trimtab.server.errors import Killed
from trimtab.server.service.flights import Flights

ERROR = Killed("steering was switched off")


async def hangs() -> str:
    await asyncio.sleep(3600)
    return "never"


async def words(n: int, then_hangs: bool, log: list[str]) -> AsyncGenerator[str, None]:
    try:
        for i in range(n):
            yield f"word {i}"
        if then_hangs:
            await hangs()
    finally:
        log.append("closed")


async def test_a_request_that_waits_for_a_hung_engine_is_ended_at_once() -> None:
    flights = Flights()
    flight = flights.start(["sha256:a"])
    waiting = asyncio.create_task(flight.whole(hangs()))
    await asyncio.sleep(0)
    assert flights.end(lambda flight: ERROR if "sha256:a" in flight.bundles else None) == 1
    with pytest.raises(Killed):
        await asyncio.wait_for(waiting, 1)


async def test_a_stream_that_waits_is_ended_and_its_source_closed() -> None:
    flights, log, got = Flights(), [], []  # type: ignore[var-annotated]
    flight = flights.start(["sha256:a"])

    async def read() -> None:
        async for word in flight.stream(words(2, True, log)):
            got.append(word)

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    flights.end(lambda _: ERROR)
    with pytest.raises(Killed):
        await asyncio.wait_for(reading, 1)
    assert got == ["word 0", "word 1"]
    assert log == ["closed"]


async def test_a_stream_whose_reader_is_busy_is_ended_at_its_next_event() -> None:
    flights = Flights()
    flight = flights.start(["sha256:a"])
    stream = flight.stream(words(5, False, []))
    assert await anext(stream) == "word 0"
    flights.end(lambda _: ERROR)
    with pytest.raises(Killed):
        await anext(stream)


async def test_a_client_that_goes_away_at_the_same_moment_is_still_gone() -> None:
    flights = Flights()
    flight = flights.start([])
    waiting = asyncio.create_task(flight.whole(hangs()))
    await asyncio.sleep(0)
    waiting.cancel()
    flights.end(lambda _: ERROR)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_whoever_is_not_meant_goes_on() -> None:
    flights = Flights()
    flight = flights.start(["sha256:b"])
    assert flights.end(lambda flight: ERROR if "sha256:a" in flight.bundles else None) == 0
    assert [word async for word in flight.stream(words(2, False, []))] == ["word 0", "word 1"]
    assert await flight.whole(asyncio.sleep(0, "done")) == "done"


async def test_a_request_that_nobody_holds_is_not_under_way() -> None:
    flights = Flights()
    flight = flights.start([])
    assert len(flights) == 1
    del flight
    gc.collect()
    assert len(flights) == 0
