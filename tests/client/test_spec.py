"""A spec is frozen, says what the server reads, and refuses what can be seen to be wrong."""

import math
from dataclasses import FrozenInstanceError, asdict

import pytest

from trimtab.client import InvalidSteeringError, Latent, Steering, Vector
from trimtab.server.steering import MAX_EDITS, MAX_STRENGTH, parse_steering

SPECS = {
    "bundle": Steering(bundle="calm"),
    "bundle at a strength": Steering(bundle="calm", strength=0.8, on_failure="open"),
    "clamp": Steering(edits=[Latent("calm", 5120).clamp(0.0).during("completion")]),
    "every operation": Steering(
        edits=[
            Latent("calm", 1).add(2, unit="max_act").at(0.5),
            Latent("calm", 2).ablate().during("prompt"),
            Latent("calm", 3).clamp(0.5, unit="resid_norm"),
            Latent("calm", 4).scale(3.0).during("all", first_token=True),
            Latent("calm", 5).project(),
            Vector("calm", "difference_in_means").add(0.5, unit="resid_norm"),
            Vector("calm", "difference_in_means").project().during("completion"),
            Latent("calm", 6).ablate().window(-5, 0, origin="prompt_end").excluding_special(),
            Latent("calm", 7).scale(2.0).window(4).gated(8, above=0.5, unit="max_act", mode="onward", bundle="kind"),
            Latent("calm", 9).clamp(1.0).window(stop=3, origin="completion").gated(8, above=1),
        ],
        on_failure="closed",
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_the_server_reads_what_the_client_writes(spec: Steering) -> None:
    read = parse_steering(spec.to_dict())
    assert (read.bundle, read.strength) == (spec.bundle, spec.strength)
    assert read.on_failure == (spec.on_failure or "closed")
    for theirs, mine in zip(read.edits or (), spec.edits, strict=True):
        assert (theirs.bundle, theirs.latent, theirs.vector) == (mine.bundle, mine.latent, mine.vector)
        assert (theirs.operation, theirs.unit, theirs.strength) == (mine.operation, mine.unit, mine.strength)
        assert theirs.value == (mine.value or 0.0)
        assert (theirs.scope.tokens, theirs.scope.first_token) == (mine.tokens, mine.first_token)
        assert theirs.scope.exclude_special == mine.exclude_special
        for read_part, part in ((theirs.scope.window, mine.positions), (theirs.gate, mine.gate)):
            assert (read_part is None) == (part is None)
            assert part is None or read_part is None or read_part.model_dump() == asdict(part)


def test_openai_gives_the_kwargs_of_a_stock_client() -> None:
    spec = Steering(edits=[Latent("calm", 5120).clamp(0.0).during("completion")], strength=0.8)
    edit = {
        "bundle": "calm",
        "latent": 5120,
        "operation": "clamp",
        "target": 0.0,
        "scope": {"tokens": "completion"},
    }
    assert spec.openai() == {"extra_body": {"steering": {"edits": [edit], "strength": 0.8}}}


def test_a_spec_is_frozen_and_hashable() -> None:
    spec = Steering(bundle="calm")
    with pytest.raises(FrozenInstanceError):
        spec.strength = 2.0  # type: ignore[misc]
    assert len({spec, Steering(bundle="calm"), spec.at(0.5)}) == 2


def test_limits_are_those_of_the_server() -> None:
    from trimtab.client import spec

    assert (spec.MAX_EDITS, spec.MAX_STRENGTH) == (MAX_EDITS, MAX_STRENGTH)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: Steering(), "steering"),
        (lambda: Steering(bundle="calm", edits=[Latent("calm", 1).ablate()]), "steering"),
        (lambda: Steering(edits=[Latent("calm", i).ablate() for i in range(MAX_EDITS + 1)]), "steering.edits"),
        (lambda: Steering(bundle="calm", strength=math.nan), "steering.strength"),
        (lambda: Steering(bundle="calm", strength=101), "steering.strength"),
        (lambda: Latent("calm", 1).clamp(math.inf), "steering.target"),
        (lambda: Latent("calm", 1).ablate().at(-101), "steering.strength"),
        (lambda: Latent("calm", 1).ablate().window(3, 3), "steering.window"),
        (lambda: Latent("calm", 1).ablate().window(-3), "steering.window"),
        (lambda: Latent("calm", 1).ablate().gated(2, above=-1.0), "steering.gate.above"),
        (lambda: Latent("calm", 1).ablate().gated(2, above=math.nan), "steering.gate.above"),
    ],
)
def test_what_is_seen_to_be_wrong_raises_at_once(make, param: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidSteeringError) as caught:
        make()
    assert caught.value.param == param
    assert caught.value.violations[0].field == param


def test_strength_zero_asks_for_nothing() -> None:
    assert Steering(bundle="calm", strength=0).is_off
    assert Steering(edits=[Latent("calm", 1).ablate().at(0)]).is_off
    assert not Steering(edits=[Latent("calm", 1).ablate().at(0), Latent("calm", 2).ablate()]).is_off
