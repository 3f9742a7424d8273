import json
from collections.abc import AsyncGenerator
from typing import Any

from trimtab.server.errors import NotApplied
from trimtab.server.service.stream import DONE, told

OPENING = {"status": "requested"}
TOTALS = {"status": "applied"}


def chunk(text: str = "", finish: str | None = None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"id": "1", "choices": [{"index": index, "text": text, "finish_reason": finish}], **fields}


USAGE = {"id": "1", "choices": [], "usage": {"completion_tokens": 2}}


async def play(
    *documents: dict[str, Any], closing: Any = lambda: TOTALS, failure: Any = None, done: bool = True
) -> list[Any]:
    async def events() -> AsyncGenerator[str, None]:
        for document in documents:
            yield f"data: {json.dumps(document)}\n\n"
        if done:
            yield DONE

    told_events = [event.text async for event in told(events(), OPENING, closing, lambda: failure)]
    return [event if event == DONE else json.loads(event.removeprefix("data: ")) for event in told_events]


async def test_the_first_chunk_says_what_was_admitted_and_the_last_what_was_applied() -> None:
    events = await play(chunk("a"), chunk("b"), chunk("", "stop"))
    assert events == [chunk("a", steering=OPENING), chunk("b"), chunk("", "stop", steering=TOTALS), DONE]


async def test_with_usage_asked_for_the_totals_are_in_the_usage_chunk() -> None:
    events = await play(chunk("a"), chunk("", "stop"), USAGE)
    assert events == [chunk("a", steering=OPENING), chunk("", "stop"), {**USAGE, "steering": TOTALS}, DONE]


async def test_a_stream_of_one_chunk_tells_the_totals() -> None:
    assert await play(chunk("a", "length")) == [chunk("a", "length", steering=TOTALS), DONE]


async def test_text_of_one_choice_does_not_wait_for_the_end_of_another() -> None:
    events = await play(chunk("a"), chunk("", "stop", 0), chunk("b", None, 1), chunk("", "stop", 1))
    assert events[1] == chunk("b", None, 1)
    assert events[2:] == [chunk("", "stop", 0), chunk("", "stop", 1, steering=TOTALS), DONE]


async def test_what_was_not_applied_ends_in_an_error_without_finish_or_done() -> None:
    def closing() -> Any:
        raise NotApplied("3 tokens were not edited")

    events = await play(chunk("a"), chunk("", "stop"), USAGE, closing=closing)
    assert events[0] == chunk("a", steering=OPENING)
    assert events[1]["error"]["code"] == "steering_not_applied"
    assert len(events) == 2


async def test_an_error_of_the_engine_keeps_openais_shape_and_is_not_counted_as_a_mismatch() -> None:
    def closing() -> Any:
        raise AssertionError("the proof of a failed run was checked")

    error = {"error": {"message": "boom", "type": "InternalServerError", "param": None, "code": 500}}
    events = await play(chunk("a"), error, closing=closing)
    assert events[1]["error"] == {"message": "boom", "type": "server_error", "param": None, "code": "internal"}
    assert events[2] == DONE


async def test_a_failure_in_the_worker_ends_the_stream_at_once() -> None:
    error = {"error": {"message": "", "type": "InternalServerError", "param": None, "code": 500}}
    events = await play(chunk("a"), error, failure=NotApplied("no slot was free"))
    assert events[0] == chunk("a", steering=OPENING)
    assert events[1]["error"]["code"] == "steering_not_applied"
    assert len(events) == 2


async def test_a_stream_that_breaks_off_does_not_end_well() -> None:
    assert await play(chunk("a"), chunk("", "stop"), done=False) == [chunk("a", steering=OPENING)]


async def test_comments_that_keep_a_connection_alive_pass() -> None:
    async def events() -> AsyncGenerator[str, None]:
        yield ": keep-alive\n\n"
        yield DONE

    first = await anext(told(events(), OPENING, lambda: TOTALS, lambda: None))
    assert (first.text, first.document) == (": keep-alive\n\n", None)


async def test_closing_a_stream_early_closes_its_source() -> None:
    closed = False

    async def events() -> AsyncGenerator[str, None]:
        nonlocal closed
        try:
            while True:
                yield f"data: {json.dumps(chunk('a'))}\n\n"
        finally:
            closed = True

    stream = told(events(), OPENING, lambda: TOTALS, lambda: None)
    await anext(stream)
    await stream.aclose()
    assert closed
