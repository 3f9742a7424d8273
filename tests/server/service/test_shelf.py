"""The shelf refuses what it must before the engine hears of it."""

import asyncio
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from tests.bundles import TINY, random_bundle
from trimtab.attribution.bundle import Bundle
from trimtab.server.errors import Forbidden, InvalidBundle, Overloaded, UnknownBundle
from trimtab.server.service import shelf as shelves
from trimtab.server.service.flights import Flights
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.shelf import Shelf

NO_ENGINE = cast(Any, None)


def shelf(*, mutable: bool = True, flights: Flights | None = None) -> Shelf:
    return Shelf(
        NO_ENGINE, TINY, Metrics(CollectorRegistry()), Flights() if flights is None else flights, mutable=mutable
    )


def test_a_server_that_was_not_told_to_takes_no_bundles() -> None:
    with pytest.raises(Forbidden, match="--allow-bundle-upload"):
        shelf(mutable=False).require_mutable()
    shelf().require_mutable()


async def test_bytes_are_checked_before_the_engine_hears_of_them() -> None:
    with pytest.raises(InvalidBundle):
        await shelf().put(b"no bundle", replace=False, pin=False)
    other = random_bundle(TINY.model_copy(update={"tokenizer": "sha256:other"}))
    with pytest.raises(InvalidBundle, match="tokenizer"):
        await shelf().put(other.to_bytes(), replace=False, pin=False)


async def test_a_full_shelf_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "MAX_SHELF_BYTES", 100)
    with pytest.raises(Overloaded, match="delete one"):
        await shelf().put(random_bundle().to_bytes(), replace=False, pin=False)


async def test_what_is_not_there_cannot_be_removed() -> None:
    with pytest.raises(UnknownBundle, match="not loaded"):
        await shelf().remove("calm")


async def test_the_engine_is_told_of_a_removed_bundle_after_the_requests_that_were_admitted_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = []

    async def load(engine: Any, bundle: Bundle) -> None: ...

    async def release(engine: Any, content_hash: str) -> bool:
        released.append(content_hash)
        return True

    monkeypatch.setattr(shelves, "load_bundle", load)
    monkeypatch.setattr(shelves, "release_bundle", release)
    monkeypatch.setattr(shelves, "POLL_SECONDS", 0.001)
    flights, bundle = Flights(), random_bundle()
    held = shelf(flights=flights)
    await held.add(bundle)
    admitted = flights.start([bundle.content_hash])
    await held.remove(bundle.header.name)
    await asyncio.sleep(0.05)
    assert released == []
    del admitted
    await asyncio.sleep(0.05)
    assert released == [bundle.content_hash]
