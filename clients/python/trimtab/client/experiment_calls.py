"""What the sync and the async client ask of experiments and outcomes: routes and bodies. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from trimtab.client.experiments import Outcome

__all__ = ["NEXT_PAGE", "Ask", "change", "create", "edit", "find", "holdout", "outcome_of", "page", "record"]

_ROOT = "/admin/v1/experiments"
NEXT_PAGE = "x-next-after"
"""The header of a page of rows that says where the next begins."""
PAGE = 10_000
TEXTS_PAGE = 1_000


class Ask(NamedTuple):
    """One call of a route outside the OpenAI API."""

    method: str
    path: str
    """From the server's root."""
    body: Mapping[str, Any] | None = None
    params: Mapping[str, Any] = {}


def find(key: str | None = None, part: str = "", **params: Any) -> Ask:
    """Reads all experiments, one, or a part of one."""
    path = _ROOT if key is None else f"{_ROOT}/{quote(key, safe='')}"
    return Ask("get", f"{path}/{part}" if part else path, None, _given(params))


def create(definition: Mapping[str, Any], reason: str) -> Ask:
    """Writes an experiment down."""
    return Ask("post", _ROOT, {"definition": dict(definition), "reason": reason})


def edit(key: str, definition: Mapping[str, Any], reason: str, revision: int | None) -> Ask:
    """Puts another definition in the place of a draft's."""
    body = _given({"definition": dict(definition), "reason": reason, "revision": revision})
    return Ask("put", f"{_ROOT}/{quote(key, safe='')}", body)


def change(key: str, action: str, reason: str, revision: int | None, **values: Any) -> Ask:
    """Moves an experiment through its life."""
    body = _given({"reason": reason, "revision": revision, **values})
    return Ask("post", f"{_ROOT}/{quote(key, safe='')}/{action}", body)


def holdout(share: float | None = None, reason: str = "") -> Ask:
    """Reads the global holdout, or sets it."""
    path = "/admin/v1/holdout"
    return Ask("get", path) if share is None else Ask("put", path, {"share": share, "reason": reason})


def page(key: str, part: str, after: str) -> Ask:
    """A page of exposures, outcomes or texts."""
    return find(key, part, after=after, limit=TEXTS_PAGE if part == "texts" else PAGE)


def record(outcomes: list[Outcome]) -> Ask:
    """Tells outcomes."""
    return Ask("post", "/v1/outcomes", {"outcomes": [outcome.to_dict() for outcome in outcomes]})


def outcome_of(response: object, name: str, value: float, event: str) -> Outcome:
    """An outcome of a reply, given itself or by its id.

    Raises:
        ValueError: it has none.
    """
    response_id = response if isinstance(response, str) else getattr(response, "id", None)
    if not response_id:
        raise ValueError(f"{type(response).__name__} is no reply and no id of one; give the reply, or its `id`")
    return Outcome(name, value, response=str(response_id), event=event)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
