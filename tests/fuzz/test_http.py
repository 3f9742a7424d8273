"""Bodies, headers and request lines of any content: a reply or a refusal with a code; never a 5xx, and an engine that goes on."""

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Server
from tests.fuzz.test_openapi import steered

GENERATION = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/steering/compare")
POSTED = (*GENERATION, "/v1/tokenize", "/v1/detokenize", "/v1/steering/validate", "/v1/steering/inspect")
SETTINGS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
NAMES = st.sampled_from(
    ["model", "messages", "prompt", "input", "steering", "bundle", "edits", "role", "content", "tools", "tool_choice",
     "response_format", "stop", "n", "seed", "logprobs", "temperature", "stream", "arms", "name", "tokens", "guided_json"]
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["calm", "user", "smollm2-135m-instruct", "\ud800", "auto", "json_object"])
)  # fmt: skip
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=10
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]) | JSON, "content": JSON})
BODIES = st.fixed_dictionaries(
    {"model": st.just("smollm2-135m-instruct") | SCALARS},
    optional={
        "messages": st.lists(TURN | JSON, max_size=3) | JSON,
        "prompt": st.text(max_size=20) | st.lists(st.integers(-1, 60_000), max_size=4) | JSON,
        "input": st.text(max_size=20) | JSON,
        "steering": st.just({"bundle": "calm"}) | JSON,
        "bundle": st.just("calm") | JSON,
        "top_count": st.integers(-1, 70) | JSON,
        "tokens": st.lists(st.integers(-1, 60_000), max_size=4) | JSON,
        "arms": st.lists(st.fixed_dictionaries({"name": SCALARS, "steering": JSON}), max_size=3) | JSON,
        "temperature": st.sampled_from([0, 1]) | JSON,
        "logprobs": JSON,
        "stop": JSON,
        "tools": JSON,
        "tool_choice": JSON,
        "response_format": JSON,
        "structured_outputs": JSON,
        "logit_bias": JSON,
        "stream": st.booleans() | JSON,
        "stream_options": JSON,
        "seed": JSON,
    },
)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    before = steered(server)
    with httpx.Client(base_url=server.base_url, timeout=120) as client:
        yield client
    assert steered(server) == before


def right(reply: httpx.Response, sent: Any) -> None:
    """Whether a reply is one."""
    assert reply.status_code < 500, (sent, reply.text)
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
        assert events, sent
        for event in events:
            assert event == "[DONE]" or json.loads(event).get("error", {}).get("type") != "server_error", (sent, event)
    elif reply.status_code >= 400:
        assert {"message", "type", "param", "code"} <= reply.json()["error"].keys(), sent


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize("examples", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_any_json_gets_a_reply_or_a_refusal(http: httpx.Client, path: str, examples: int) -> None:
    @settings(SETTINGS, max_examples=examples)
    @given(body=BODIES)
    def hostile(body: dict[str, Any]) -> None:
        if path in GENERATION:
            body |= {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 4}
        right(http.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), body)

    hostile()


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_any_bytes_are_refused(http: httpx.Client, path: str, examples: int) -> None:
    @settings(SETTINGS, max_examples=examples)
    @given(body=st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
    def hostile(body: bytes) -> None:
        reply = http.post(path, content=body, headers={"content-type": "application/json"})
        assert 400 <= reply.status_code < 500, body
        right(reply, body)

    hostile()


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_any_head_gets_an_answer_or_a_closed_connection(server: Server, http: httpx.Client, examples: int) -> None:
    """Written to the socket as it is: no client library would send it."""
    url = urlsplit(server.base_url)
    token = st.sampled_from([b"GET", b"POST", b"PUT", b"TRACE", b"", b"\xff"]) | st.binary(max_size=8)
    target = st.sampled_from([b"/v1/models", b"/livez", b"*", b"//", b"/%00", b"http://x/"]) | st.binary(max_size=30)
    name = st.sampled_from(
        [b"Host", b"Content-Length", b"Transfer-Encoding", b"Expect", b"Upgrade", b"Authorization", b"X-Request-Id"]
    ) | st.binary(min_size=1, max_size=12)
    value = st.sampled_from(
        [b"0", b"-1", b"chunked", b"99999999999999999999", b"100-continue", b"websocket"]
    ) | st.binary(max_size=30)

    @settings(SETTINGS, max_examples=examples)
    @given(
        line=st.tuples(token, target), headers=st.lists(st.tuples(name, value), max_size=5), body=st.binary(max_size=20)
    )
    def hostile(line: tuple[bytes, bytes], headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        head = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % line
        head += b"".join(b"%s: %s\r\n" % header for header in headers)
        with socket.create_connection((url.hostname or "", url.port or 0), timeout=30) as sock:
            try:
                sock.sendall(head + b"\r\n" + body)
                sock.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
            except (ConnectionResetError, BrokenPipeError):
                answer = b""
        if answer:
            assert answer.startswith(b"HTTP/1.1 "), answer
            assert int(answer[9:12]) < 500, (head, answer)

    hostile()
    assert http.get("/livez").status_code == 200
