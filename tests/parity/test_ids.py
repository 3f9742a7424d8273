"""Ids of requests are whatever a client makes them."""

from typing import Any

import pytest

from tests.parity.cases import PROMPTS
from tests.parity.engine import Answer, Engine, answer
from tests.parity.test_paths import ADD, CLAMP, N_TOKENS, ONWARD, PLANS, TAIL, Steps, check, same
from trimtab.server.engine import proof
from trimtab.server.engine.proof import KEY
from trimtab.server.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def alone(engine: Engine) -> dict[Plan | None, Answer]:
    """Each plan on the long prompt, alone and cold."""
    found = {}
    for wanted in PLANS:
        engine.cold()
        (found[wanted],) = engine.ask([(PROMPTS["long"], wanted)], n_tokens=N_TOKENS)
    return found


def test_ids_that_prefix_one_another_are_different_requests(engine: Engine, alone: dict[Plan | None, Answer]) -> None:
    """The children of `r` are called `0_r` and `1_r` in vLLM, and so may be requests of a client."""
    engine.cold()
    running = Steps(engine)
    ids = {"r": TAIL, "r1": ADD, "r10": None, "0_r": CLAMP, "1_r": ONWARD, "": ADD}
    for name, wanted in ids.items():
        several: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3} if name == "r" else {}
        running.add(name, PROMPTS["long"], wanted, **several)
    running.add("r2", PROMPTS["long"], ADD)
    running.step(5)
    running.core.abort_request(["r2"])
    outputs = running.finish()
    assert outputs.keys() == ids.keys()
    for name, wanted in ids.items():
        if name == "r":
            found = outputs[name].kv_transfer_params[KEY]
            proof.verify(TAIL, found, len(alone[wanted].prompt), [N_TOKENS, N_TOKENS])
        else:
            assert same(answer(outputs[name]), alone[wanted]), name
            check(answer(outputs[name]), wanted)
