"""What a request says of who sent it: the units that experiments randomise by, and the attributes that they target. Pure.

    X-Trimtab-User, -Conversation, -Tenant     or the body's `user`, its `session_id`, the caller's key
    X-Trimtab-Attributes: {"plan": "pro"}      a JSON object, for targeting
    X-Trimtab-Arm: calm-replies=calm           an arm that is asked for

The unit `request` is the request's own id. gRPC has the same as metadata.
"""

import json
from collections.abc import Mapping
from typing import Any

from trimtab.server.errors import InvalidRequest, Violation

__all__ = ["PREFIX", "attributes", "forced_arm"]

PREFIX = "x-trimtab-"
_FIELDS = {"user": "user", "conversation": "session_id"}


def attributes(
    headers: Mapping[str, str], document: Mapping[str, Any], *, key_id: str | None, request_id: str
) -> dict[str, Any]:
    """All that targeting may ask for, the units among it; `headers` are in lower case.

    Raises:
        InvalidRequest: the attributes are no JSON object, or name a unit.
    """
    found = _given(headers.get(f"{PREFIX}attributes"))
    found |= {"model": document.get("model"), "stream": document.get("stream") is True, "key": key_id}
    for unit, field in _FIELDS.items():
        value = headers.get(PREFIX + unit)
        found[unit] = document.get(field) if value is None else value
    found["tenant"] = headers.get(f"{PREFIX}tenant", key_id)
    found["request"] = request_id
    return {name: value for name, value in found.items() if value is not None}


def forced_arm(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """The experiment and the arm that are asked for.

    Raises:
        InvalidRequest: it is not `experiment=arm`.
    """
    given = headers.get(f"{PREFIX}arm")
    if given is None:
        return None
    experiment, sign, arm = given.partition("=")
    if not sign or not experiment or not arm:
        raise InvalidRequest([Violation(f"{PREFIX}arm", f"is `experiment=arm`, not {given[:60]!r}")])
    return experiment.strip(), arm.strip()


_OURS = frozenset({"user", "conversation", "tenant", "request", "model", "stream", "key"})


def _given(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    where = f"{PREFIX}attributes"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest([Violation(where, f"is no JSON ({str(e)[:80]})")]) from e
    if not isinstance(found, dict):
        raise InvalidRequest([Violation(where, f"is a JSON object, not {type(found).__name__}")])
    if clash := sorted(_OURS.intersection(found)):
        raise InvalidRequest([Violation(where, f"may not say {', '.join(clash)}, which has a place of its own")])
    return found
