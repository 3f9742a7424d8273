"""What a grader reads is what was asked and what was answered."""

from typing import Any

import pytest

from trimtab.server.service.texts import piece_of, prompt_of, reply_of

PARTS = [{"type": "text", "text": "How are "}, {"type": "text", "text": "you?"}]


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"prompt": "Once"}, "Once"),
        ({"prompt": [1, 2]}, ""),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}, {"role": "user", "content": "b"}]},
            "b",
        ),
        ({"messages": [{"role": "user", "content": PARTS}]}, "How are you?"),
        ({"messages": "?"}, ""),
        ({"input": "hi"}, "hi"),
        ({"input": [{"role": "user", "content": "hi"}], "instructions": "x"}, "hi"),
        ({}, ""),
    ],
)
def test_the_prompt_is_the_last_that_the_user_said(document: dict[str, Any], text: str) -> None:
    assert prompt_of(document) == text


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"choices": [{"text": "a"}, {"text": "b"}]}, "a"),
        ({"choices": [{"message": {"content": "a"}}]}, "a"),
        ({"choices": [{"message": {"content": None, "tool_calls": []}}]}, ""),
        ({"output": [{"type": "reasoning"}, {"type": "message", "content": [{"text": "a"}, {"text": "b"}]}]}, "ab"),
        ({}, ""),
    ],
)
def test_the_reply_is_the_first_sample(document: dict[str, Any], text: str) -> None:
    assert reply_of(document) == text


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"choices": [{"index": 0, "delta": {"content": "a"}}]}, "a"),
        ({"choices": [{"index": 1, "delta": {"content": "a"}}]}, ""),
        ({"choices": [{"index": 0, "text": "a"}]}, "a"),
        ({"choices": [], "usage": {}}, ""),
        ({"type": "response.output_text.delta", "delta": "a"}, "a"),
        ({"type": "response.output_text.done", "text": "a"}, ""),
    ],
)
def test_a_chunk_adds_its_piece(document: dict[str, Any], text: str) -> None:
    assert piece_of(document) == text
