"""A server that answers from a script.

Why a fake here: what a broken or foreign server answers cannot be had from the real one, and the shape of what the client sends
is seen best at the transport. What the real server answers is tested in `test_against_server.py`.
"""

import json
from collections.abc import Callable
from typing import Any

import httpx2

PROOF: dict[str, Any] = {
    "status": "applied",
    "plan": "sha256:0123456789abcdef0123456789abcdef",
    "bundles": ["calm"],
    "prompt_tokens": 0,
    "completion_tokens": 7,
    "cached_prompt_tokens": 0,
    "gate_firings": 3,
    "special_tokens": 1,
    "max_relative_norm": 0.21,
    "mean_relative_norm": 0.11,
    "hook_points": {
        "blocks.14.resid_post": {
            "prompt_tokens": 0,
            "completion_tokens": 7,
            "cached_prompt_tokens": 0,
            "gate_firings": 3,
            "special_tokens": 1,
            "max_relative_norm": 0.21,
            "mean_relative_norm": 0.11,
        }
    },
}

Answer = Callable[[httpx2.Request], httpx2.Response]


def chat_reply(steering: object) -> dict[str, Any]:
    """A chat reply with this `steering` object; None leaves it out."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Paris."}}
    reply = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return reply if steering is None else {**reply, "steering": steering}


def chat_chunks(*, opening: object, closing: object) -> list[dict[str, Any]]:
    """Three chunks of a chat reply, `steering` in the first and the last."""

    def chunk(text: str, finish: str | None, steering: object) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
        body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        return body if steering is None else {**body, "steering": steering}

    return [chunk("Par", None, opening), chunk("is", None, None), chunk(".", "stop", closing)]


def answers(body: object, *, status: int = 200) -> Answer:
    """Always this JSON."""
    return lambda request: httpx2.Response(status, json=body, headers={"x-request-id": "req-7"}, request=request)


def streams(events: list[dict[str, Any]]) -> Answer:
    """Always these server-sent events, then [DONE]."""
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    headers = {"content-type": "text/event-stream"}
    return lambda request: httpx2.Response(200, content=text.encode(), headers=headers, request=request)


def transport(answer: Answer, seen: list[Any] | None = None) -> httpx2.MockTransport:
    """A transport that answers so, and notes the JSON of each request."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        if seen is not None and request.content:
            seen.append(json.loads(request.content))
        return answer(request)

    return httpx2.MockTransport(handle)
