"""The events of a response: what was admitted first, what was applied last, and no end before the proof."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from trimtab.server.errors import InvalidRequest, NotApplied
from trimtab.server.service.responses import admissible, responses_told

OPENING = {"status": "requested"}
TOTALS = {"status": "applied"}


class Said:
    """An event of vLLM's."""

    def __init__(self, kind: str, **fields: Any) -> None:
        self._document = {"type": kind, **fields}

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return dict(self._document)


def response(status: str) -> dict[str, Any]:
    return {"id": "resp_1", "status": status, "kv_transfer_params": None}


CREATED = Said("response.created", response=response("in_progress"))
DELTA = Said("response.output_text.delta", delta="so")
TEXT_DONE = Said("response.output_text.done", text="so")
ITEM_DONE = Said("response.output_item.done", item={"status": "completed"})
ADDED = Said("response.output_item.added", item={})
COMPLETED = Said("response.completed", response=response("completed"))


async def play(*said: Said, closing: Any = lambda: TOTALS, failure: Any = None, error: Any = None) -> list[Any]:
    async def events() -> AsyncGenerator[Said, None]:
        for event in said:
            yield event
        if error is not None:
            raise error

    return [event async for event in responses_told(events(), OPENING, closing, lambda: failure)]


async def test_the_first_response_says_what_was_admitted_and_the_last_what_was_applied() -> None:
    told = await play(CREATED, DELTA, TEXT_DONE, ITEM_DONE, COMPLETED)
    kinds = ["created", "output_text.delta", "output_text.done", "output_item.done", "completed"]
    assert [event.document["type"] for event in told] == [f"response.{kind}" for kind in kinds]
    assert told[0].document["response"] == {"id": "resp_1", "status": "in_progress", "steering": OPENING}
    assert told[-1].document["response"]["steering"] == TOTALS
    assert told[0].text.startswith("event: response.created\ndata: {")
    assert json.loads(told[0].text.partition("data: ")[2]) == told[0].document


async def test_a_part_that_ended_is_told_once_something_follows_it() -> None:
    told = await play(CREATED, DELTA, ITEM_DONE, ADDED)
    assert [event.document["type"] for event in told][-2:] == [
        "response.output_item.done",
        "response.output_item.added",
    ]


async def test_what_was_not_applied_ends_in_an_error_without_an_end() -> None:
    def closing() -> Any:
        raise NotApplied("3 tokens were not edited")

    told = await play(CREATED, DELTA, TEXT_DONE, ITEM_DONE, COMPLETED, closing=closing)
    assert [event.document["type"] for event in told] == ["response.created", "response.output_text.delta", "error"]
    error = told[-1].document
    assert (error["code"], error["error"]["code"]) == ("steering_not_applied", "steering_not_applied")
    assert error["sequence_number"] == 2


async def test_a_failure_in_the_worker_ends_the_stream_at_once() -> None:
    failed = NotApplied("no slot was free")
    told = await play(CREATED, DELTA, TEXT_DONE, failure=failed, error=RuntimeError("wrapped by vLLM"))
    assert told[-1].document["error"]["message"] == "no slot was free"
    assert len(told) == 3


async def test_an_error_of_the_engine_tells_nothing_of_its_insides() -> None:
    told = await play(CREATED, error=RuntimeError("secret path"))
    assert told[-1].document["code"] == "internal"
    assert "secret" not in told[-1].text


@pytest.mark.parametrize(
    "asked", [{"background": True}, {"previous_response_id": "resp_1"}, {"previous_input_messages": [{}]}]
)
def test_what_needs_a_store_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="keeps no responses"):
        admissible({"input": "hi", **asked})
    assert admissible({"input": "hi", "background": False})["store"] is False
