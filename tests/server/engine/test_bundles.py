"""Who still uses a bundle is read from the scheduler's own requests."""

from types import SimpleNamespace
from typing import Any

from tests.bundles import random_bundle
from trimtab.server.engine.bundles import users
from trimtab.server.plan import compile_plan
from trimtab.server.steering import parse_steering

CALM, WILD = random_bundle(), random_bundle(name="wild", seed=1)


def request(name: str, extra: dict[str, Any] | None) -> Any:
    return SimpleNamespace(request_id=name, sampling_params=SimpleNamespace(extra_args=extra))


def test_users_are_the_requests_whose_plan_names_the_bundle() -> None:
    named = {"calm": CALM, "wild": WILD}
    wires = {name: compile_plan(parse_steering({"bundle": name}), named).wire() for name in named}
    requests = [
        request("one", {"trimtab": wires["calm"]}),
        request("two", {"trimtab": wires["wild"]}),
        request("unsteered", None),
        request("another's", {"other": 1}),
        request("broken", {"trimtab": "no plan"}),
        SimpleNamespace(request_id="pooling", sampling_params=None),
    ]
    assert users(requests, CALM.content_hash) == ["one"]
    assert users(requests, WILD.content_hash) == ["two"]
    assert users(requests, "sha256:0") == []
