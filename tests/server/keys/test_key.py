from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.server.errors import Forbidden, InvalidRequest, InvalidSteering
from trimtab.server.keys.key import ANONYMOUS, Caller, Policy, Scope, make, parse_scopes, public_part
from trimtab.server.steering import parse_steering

EDITS = {"edits": [{"bundle": "calm", "latent": 7, "operation": "ablate", "strength": 2.0}]}


def caller(*scopes: Scope, **policy: Any) -> Caller:
    return Caller("key:abc", frozenset(scopes), Policy(**policy))


def check(who: Caller, steering: Any, **bundles: str) -> None:
    who.check(parse_steering(steering), bundles or {"calm": "calm:v2"})


def test_a_key_is_long_public_in_front_and_never_the_same() -> None:
    made = [make() for _ in range(100)]
    assert len({text for text, _ in made}) == len({public for _, public in made}) == 100
    assert all(public_part(text) == public and len(text) == 57 for text, public in made)


@given(st.text(max_size=80))
def test_what_is_no_key_has_no_public_part(text: str) -> None:
    assert public_part(text) is None


def test_free_form_edits_need_the_scope() -> None:
    check(caller("infer", "steer"), EDITS)
    check(caller("infer"), {"bundle": "calm"})
    with pytest.raises(Forbidden, match="scope steer"):
        check(caller("infer"), EDITS)


def test_a_list_allows_a_name_in_every_version_or_one_version() -> None:
    every, one = caller("infer", bundles=("calm",)), caller("infer", bundles=("calm:v2",))
    check(every, {"bundle": "calm"}, calm="calm:v9")
    check(one, {"bundle": "calm"}, calm="calm:v2")
    with pytest.raises(Forbidden, match="may not use bundle 'calm'"):
        check(one, {"bundle": "calm"}, calm="calm:v3")
    with pytest.raises(Forbidden):
        check(every, {"bundle": "wild"}, wild="wild")


@pytest.mark.parametrize(("strength", "allowed"), [(0.5, True), (1.0, True), (1.01, False), (-0.1, False)])
def test_strength_has_bounds(strength: float, allowed: bool) -> None:
    bounded = caller("infer", "steer", strength=(0.0, 1.0))
    half = {"edits": [{**EDITS["edits"][0], "strength": strength * 2}], "strength": 0.5}
    for steering in ({"bundle": "calm", "strength": strength}, half):
        if allowed:
            check(bounded, steering)
        else:
            with pytest.raises(InvalidSteering, match=r"allows 0 … 1"):
                check(bounded, steering)


@pytest.mark.parametrize(
    "policy",
    [
        {"strength": (1, 0)},
        {"strength": (0, float("nan"))},
        {"strength": (0, 101)},
        {"bundles": ["../x"]},
        {"requests_per_minute": 0},
        {"unknown": 1},
    ],
)
def test_a_policy_that_means_nothing_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy(**policy)


def test_a_caller_needs_one_of_the_scopes() -> None:
    caller("infer").require(("infer", "admin"))
    with pytest.raises(Forbidden, match=r"scope admin; key:abc has infer"):
        caller("infer").require(("admin",))
    ANONYMOUS.require(("admin",))


@pytest.mark.parametrize("names", [(), ("root",), ("infer", "Admin")])
def test_scopes_that_are_none_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="must be of infer"):
        parse_scopes(names)
