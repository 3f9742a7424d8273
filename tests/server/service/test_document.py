from typing import Any

import pytest

from trimtab.server.errors import InvalidRequest
from trimtab.server.service.admin_routes import Kill, NewKey, Rotation
from trimtab.server.service.document import Body, body_of


@pytest.mark.parametrize(
    ("kind", "fields", "at_fault"),
    [
        (NewKey, {"label": "x", "scopes": ["infer"], "expires_at": 0}, ["expires_at"]),
        (NewKey, {"label": "x", "scopes": ["infer"], "expires_at": "2026-01-01T00:00:00"}, ["expires_at"]),
        (NewKey, {"label": "x", "scopes": ["infer"], "expires_at": "9999-12-31T23:00:00-02:00"}, ["expires_at"]),
        (NewKey, {"label": "x", "scopes": ["infer"], "policy": {"opt_out": 1}}, ["policy.opt_out"]),
        (NewKey, {"scopes": [], "lable": "x"}, ["label", "lable", "scopes"]),
        (Rotation, {"grace_seconds": False}, ["grace_seconds"]),
        (Rotation, {"grace_seconds": "60"}, ["grace_seconds"]),
        (Kill, {"mode": "on", "reason": "x"}, ["mode"]),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused_and_all_of_it(
    kind: type[Body], fields: dict[str, Any], at_fault: list[str]
) -> None:
    """`"expires_at": 0` made a key that had expired in 1970, and answered 201; the end of the year 9999 in the west was a 500."""
    with pytest.raises(InvalidRequest) as caught:
        body_of(kind, fields)
    assert sorted(violation.field for violation in caught.value.violations) == at_fault


def test_what_is_right_is_taken() -> None:
    key = body_of(
        NewKey,
        {"label": "x", "scopes": ["infer"], "policy": {"strength": [0, 1.5]}, "expires_at": "2099-01-01T00:00:00Z"},
    )
    assert (key.policy.strength, key.scopes) == ((0.0, 1.5), ("infer",))
    assert key.expires_at is not None
    assert body_of(Rotation, {}).grace_seconds == 0
