from typing import Any

import pytest

from trimtab.server.database.database import Database
from trimtab.server.errors import InvalidRequest, InvalidSteering, NotFound
from trimtab.server.fleet.defaults import DefaultSteering
from trimtab.server.fleet.snapshot import read_snapshot
from trimtab.server.fleet.switch import OFF, KillSwitch, Mode


def test_the_switch_is_off_until_it_is_thrown(database: Database) -> None:
    assert KillSwitch(database).read() == OFF


def test_what_was_thrown_is_what_is_read(database: Database) -> None:
    switch = KillSwitch(database)
    throws: tuple[tuple[Mode, Any], ...] = (
        ("unsteered", None),
        ("fallback", {"bundle": "safe:v1", "strength": 0.5}),
        ("refuse", None),
    )
    for mode, fallback in throws:
        thrown = switch.throw(mode, actor="cli:me", reason="rude", fallback=fallback)
        assert switch.read() == thrown == read_snapshot(database).switch
    assert switch.throw("off", actor="cli:me", reason="mended").mode == "off"
    assert [entry.action for entry in database.entries()] == ["switch.kill"] * 3 + ["switch.resume"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "unsteered", "reason": " "}, InvalidRequest),
        ({"mode": "unsteered", "reason": "x" * 1001}, InvalidRequest),
        ({"mode": "fallback", "reason": "x"}, InvalidRequest),
        ({"mode": "unsteered", "reason": "x", "fallback": {"bundle": "a"}}, InvalidRequest),
        ({"mode": "fallback", "reason": "x", "fallback": {"bundel": "a"}}, InvalidSteering),
    ],
)
def test_a_throw_that_means_nothing_is_refused(database: Database, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        KillSwitch(database).throw(actor="cli:me", **options)
    assert KillSwitch(database).read() == OFF


def test_the_default_of_the_alias_counts_before_the_keys_before_the_fleets(database: Database) -> None:
    defaults = DefaultSteering(database)
    for kind, subject in (("fleet", ""), ("key", "abcdefghij"), ("alias", "safe-model")):
        defaults.put(kind, subject, {"bundle": kind}, actor="cli:me")  # type: ignore[arg-type]
    known = read_snapshot(database).defaults
    found = [
        known.find(key_id=key, alias=alias)
        for key, alias in (("abcdefghij", "safe-model"), ("abcdefghij", None), ("other", None), (None, None))
    ]
    assert [default.kind for default in found if default is not None] == ["alias", "key", "fleet", "fleet"]
    assert known.aliases() == ("safe-model",)


def test_a_default_is_replaced_and_removed(database: Database) -> None:
    defaults = DefaultSteering(database)
    for strength in (1.0, 0.5):
        defaults.put("fleet", "", {"bundle": "calm", "strength": strength}, actor="cli:me")
    (default,) = defaults.list()
    assert default.steering.strength == 0.5
    defaults.remove("fleet", "", actor="cli:me")
    assert defaults.list() == ()
    with pytest.raises(NotFound):
        defaults.remove("fleet", "", actor="cli:me")


@pytest.mark.parametrize(
    ("kind", "subject"), [("fleet", "x"), ("key", "x"), ("alias", ""), ("alias", "a b"), ("tenant", "x")]
)
def test_a_default_has_a_subject_of_its_kind(database: Database, kind: Any, subject: str) -> None:
    with pytest.raises(InvalidRequest):
        DefaultSteering(database).put(kind, subject, {"bundle": "calm"}, actor="cli:me")
