"""What `/v1/responses` needs beside the other generation routes: its refusals, and the steering told in its events. Pure.

The steering is a field of the `response` object: in `response.created` what was admitted, in `response.completed` what was
applied. An event that ends a part (`….done`) is held back until something follows it, and the last ones until the proof is
checked: text of a run that was not steered as asked is never followed by its end.
"""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from trimtab.server.errors import InvalidRequest, TrimtabError, Violation
from trimtab.server.service.problem import Problem, of_error
from trimtab.server.service.stream import Event

__all__ = ["admissible", "responses_told"]

_WHY = "this server keeps no responses; send the conversation in `input`"
_STORED = {"background": _WHY, "previous_response_id": _WHY, "previous_input_messages": _WHY}
log = logging.getLogger("trimtab")


def admissible(document: Mapping[str, Any]) -> dict[str, Any]:
    """The request, which is not stored.

    Raises:
        InvalidRequest: it asks for what needs a store of responses.
    """
    violations = [Violation(field, why) for field, why in _STORED.items() if document.get(field)]
    if violations:
        raise InvalidRequest(violations)
    return {**document, "store": False}


async def responses_told(
    events: AsyncGenerator[Any, None],
    opening: Mapping[str, Any],
    closing: Callable[[], Mapping[str, Any]],
    failure: Callable[[], TrimtabError | None],
) -> AsyncGenerator[Event, None]:
    """vLLM's events with `opening` in the first responses and `closing()` in the completed one.

    `closing` is called once, when the response is complete; when it raises NotApplied the stream ends with that error instead.
    `failure` tells, when vLLM's stream raises, whether that is a plan that was not applied.
    """
    held: list[dict[str, Any]] = []
    n_sent = 0
    try:
        async with aclosing(events):
            async for event in events:
                document = event.model_dump(mode="json", by_alias=True)
                kind = document["type"]
                if kind == "response.completed":
                    _tell(document, closing())
                elif "response" in document:
                    _tell(document, opening)
                elif kind.endswith(".done"):
                    held.append(document)
                    continue
                for ready in (*held, document):
                    n_sent += 1
                    yield _event(ready)
                held.clear()
    except TrimtabError as e:
        yield _failed(of_error(failure() or e), n_sent)
    except Exception as e:
        if (cause := failure()) is not None:
            yield _failed(of_error(cause), n_sent)
            return
        log.exception("a generation failed")
        what = f"the engine failed on this request ({type(e).__name__}); the server's log has the cause"
        yield _failed(Problem(500, "internal", what), n_sent)


def _tell(document: dict[str, Any], steering: Mapping[str, Any]) -> None:
    document["response"].pop("kv_transfer_params", None)
    document["response"]["steering"] = dict(steering)


def _event(document: Mapping[str, Any]) -> Event:
    return Event(f"event: {document['type']}\ndata: {json.dumps(document, separators=(',', ':'))}\n\n", document)


def _failed(problem: Problem, n_sent: int) -> Event:
    """The error twice: as an event of this API has it, and under `error`, where OpenAI's SDKs look."""
    own = {"code": problem.code, "message": problem.message, "param": problem.param}
    event = _event({"type": "error", "sequence_number": n_sent, **own, **problem.document})
    return event._replace(problem=problem)
