from typing import Any

import pytest


def test_a_key_is_made_listed_rotated_and_revoked(run: Any) -> None:
    arguments = ("--scope", "infer", "--bundle", "calm", "--strength", "0", "1", "--per-minute", "60", "--json")
    made = run("keys", "create", "app", *arguments)[1]
    assert made["key"].startswith(f"tt_{made['id']}_")
    assert made["policy"] == {"bundles": ["calm"], "strength": [0.0, 1.0], "requests_per_minute": 60}
    (listed,) = run("keys", "list", "--json")[1]
    assert "key" not in listed
    assert "digest" not in listed
    new = run("keys", "rotate", made["id"], "--json")[1]
    assert new["rotated_from"] == made["id"]
    assert run("keys", "revoke", new["id"], "--json")[1]["revoked_at"] is not None
    actions = [entry["action"] for entry in run("registry", "audit", "list", "--json")[1]]
    assert actions == ["secret.set", "key.create", "key.rotate", "key.revoke"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "app", "--scope", "root"), "must be of infer"),
        (("create", "app", "--scope", "infer", "--strength", "1", "0"), "is above the most"),
        (("revoke", "nowhere"), "there is no key"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(run: Any, arguments: tuple[str, ...], message: str) -> None:
    code, said = run("keys", *arguments)
    assert code == 2
    assert message in said


def test_the_switch_is_thrown_and_released(run: Any) -> None:
    assert run("kill", "status", "--json")[1]["mode"] == "off"
    thrown = run("kill", "on", "--reason", "it is rude", "--fallback", "calm:v1", "--strength", "0.5", "--json")[1]
    assert (thrown["mode"], thrown["fallback"]) == ("fallback", {"bundle": "calm:v1", "strength": 0.5})
    assert run("kill", "status", "--json")[1] == thrown
    assert run("kill", "off", "--reason", "mended", "--json")[1]["mode"] == "off"
    assert run("kill", "on", "--reason", "x", "--refuse", "--fallback", "calm")[0] == 2
