"""A stream of server-sent events with the steering told in it: what was admitted first, what was applied last. Pure.

The chunks that say a completion is finished are held back until the proof is checked: text of a run that was not steered as
asked is never followed by a finish reason, nor by [DONE].
"""

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from trimtab.server.errors import NotApplied, TrimtabError
from trimtab.server.service.problem import Problem, of_error, of_vllm

__all__ = ["DONE", "Event", "told"]

DONE = "data: [DONE]\n\n"
_PREFIX = "data: "


class Event(NamedTuple):
    """One event of a stream."""

    text: str
    """As it goes over HTTP."""
    document: Mapping[str, Any] | None = None
    """Its JSON object; None for a comment, and for [DONE]."""
    problem: Problem | None = None
    """The error that it tells; nothing but [DONE] follows it."""


async def told(
    events: AsyncGenerator[str, None],
    opening: Mapping[str, Any],
    closing: Callable[[], Mapping[str, Any]],
    failure: Callable[[], TrimtabError | None],
) -> AsyncGenerator[Event, None]:
    """The events of vLLM's stream with `opening` in the first chunk and `closing()` in the last.

    `closing` is called once, when the stream is complete; when it raises NotApplied the stream ends with that error instead.
    `failure` tells, when vLLM's stream turns into an error, whether that is a plan that was not applied, or the end of a
    request that was ended.
    """
    held: list[dict[str, Any]] = []
    first, failed = True, False
    try:
        async with aclosing(events):
            async for event in events:
                if event == DONE:
                    break
                chunk = _payload(event)
                if chunk is None:
                    yield Event(event)
                    continue
                if "error" in chunk:
                    if (cause := failure()) is not None:
                        yield _failed(of_error(cause))
                        return
                    failed = True
                    yield _failed(_problem(chunk["error"]))
                    continue
                touched = first
                if first:
                    chunk["steering"] = dict(opening)
                    first = False
                if _finishes(chunk):
                    held.append(chunk)
                else:
                    yield _event(chunk) if touched else Event(event, chunk)
            else:
                return  # The source ended without [DONE]: neither do we say it.
    except TrimtabError as e:
        yield _failed(of_error(failure() or e))
        return
    if not failed:
        try:
            totals = dict(closing())
        except NotApplied as e:
            yield _failed(of_error(e))
            return
        if not held:
            held.append({"object": "steering", "choices": []})
        held[-1]["steering"] = totals
    for chunk in held:
        yield _event(chunk)
    yield Event(DONE)


def _payload(event: str) -> dict[str, Any] | None:
    """The JSON object of an event; None for a comment, which keeps a connection alive."""
    if not event.startswith(_PREFIX):
        return None
    payload: dict[str, Any] = json.loads(event[len(_PREFIX) :])
    return payload


def _finishes(chunk: Mapping[str, Any]) -> bool:
    choices = chunk.get("choices") or []
    return not choices or any(choice.get("finish_reason") is not None for choice in choices)


def _event(document: Mapping[str, Any]) -> Event:
    return Event(f"{_PREFIX}{json.dumps(document, separators=(',', ':'))}\n\n", document)


def _failed(problem: Problem) -> Event:
    return _event(problem.document)._replace(problem=problem)


def _problem(error: Mapping[str, Any]) -> Problem:
    status = error.get("code")
    return of_vllm(status if isinstance(status, int) else 500, str(error.get("message")), error.get("param"))
