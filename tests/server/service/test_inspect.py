"""An inspection keeps what it reads by until it has read it."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.bundles import random_bundle
from trimtab.server.errors import Revoked
from trimtab.server.service.flights import Flights
from trimtab.server.service.inspect import Inspector
from trimtab.server.service.rules import FREE

CALM = random_bundle()


async def test_a_bundle_is_in_use_from_the_admission_of_its_inspection_to_its_end() -> None:
    asked = asyncio.Event()

    async def create_tokenize(*_: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    config = SimpleNamespace(
        additional_config=None,
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(enforce_eager=True),
    )
    flights = Flights()
    generation = SimpleNamespace(
        rules=lambda: FREE, bundles={"calm": CALM}, engine=SimpleNamespace(vllm_config=config), flights=flights
    )
    inspector = Inspector(cast(Any, generation), cast(Any, SimpleNamespace(create_tokenize=create_tokenize)))
    running = asyncio.create_task(inspector.inspect({"bundle": "calm", "prompt": "The sea"}, "r"))
    await asked.wait()
    assert flights.use(CALM.content_hash)
    flights.end(lambda flight: Revoked("calm was revoked"))
    with pytest.raises(Revoked):
        await running
    assert not flights.use(CALM.content_hash)
