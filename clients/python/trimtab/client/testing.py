"""A Trimtab server in memory, for the tests of whoever uses this client: no network, no model, the client's own code all the way.

    server = FakeServer("Paris.")
    with server.client() as client:
        reply = client.chat.completions.create(model="m", messages=[...], steering=Steering(bundle="calm"))
    assert reply.steering.status == "applied"
    assert server.requests[0]["steering"] == {"bundle": "calm"}

It answers every request with the same text, one token for each word, and proves whatever steering was asked for. `fail` and
`forget_steering` are for testing what your code does when that goes wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2

from trimtab.client.aio import AsyncTrimtab
from trimtab.client.http import Trimtab

__all__ = ["FakeServer"]

HOOK_POINT = "blocks.0.resid_post"


class FakeServer:
    """Answers generation, comparisons, validation, outcomes and the list of bundles."""

    def __init__(self, text: str = "A reply.", *, bundles: tuple[str, ...] = ("calm",)) -> None:
        self.text = text
        self.bundles = bundles
        self.requests: list[dict[str, Any]] = []
        """The JSON of each request that had a body, in order."""
        self._failures: list[httpx2.Response] = []
        self._forgets = False

    def client(self, **options: Any) -> Trimtab:
        """A client of this server; `options` are `Trimtab`'s."""
        return Trimtab("http://fake", http_client=httpx2.Client(transport=self._transport()), **options)

    def async_client(self, **options: Any) -> AsyncTrimtab:
        """An asynchronous client of this server; `options` are `AsyncTrimtab`'s."""
        return AsyncTrimtab("http://fake", http_client=httpx2.AsyncClient(transport=self._transport()), **options)

    def fail(self, code: str, message: str = "as asked", *, status: int = 400, param: str | None = None) -> None:
        """The next request fails with this code (`invalid_steering`, `steering_not_applied`, …); call it again for more."""
        error = {"message": message, "code": code, "param": param, "type": "invalid_request_error"}
        headers = {"x-should-retry": "false", "x-request-id": "fake"}
        self._failures.append(httpx2.Response(status, json={"error": error}, headers=headers))

    def forget_steering(self) -> None:
        """From now on replies are those of a server that knows nothing of steering."""
        self._forgets = True

    def _transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self._answer)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        asked: dict[str, Any] = json.loads(request.content) if request.content else {}
        if request.content:
            self.requests.append(asked)
        if self._failures:
            return self._failures.pop(0)
        match request.url.path.removeprefix("/v1"):
            case "/chat/completions" | "/completions":
                chat = "messages" in asked
                if asked.get("stream"):
                    return _events(self._chunks(asked, chat))
                return httpx2.Response(200, json=self._whole(asked, chat))
            case "/steering/compare":
                return _events(self._pieces(asked))
            case "/steering/validate":
                found = {"plan": _plan(asked["steering"]), "bundles": list(self.bundles), "hook_points": [HOOK_POINT]}
                return httpx2.Response(200, json={**found, "n_rows": 1, "valid": True})
            case "/outcomes":
                return httpx2.Response(200, json={"recorded": len(asked["outcomes"]), "duplicate": 0, "pending": 0})
            case "/steering/bundles":
                return httpx2.Response(200, json={"object": "list", "data": [_bundle(name) for name in self.bundles]})
            case path:
                error = {"message": f"the fake server has no {path}", "code": "not_found", "param": None}
                return httpx2.Response(404, json={"error": error})

    def _steering(self, asked: Mapping[str, Any], *, done: bool) -> dict[str, Any]:
        if self._forgets:
            return {}
        if "steering" not in asked:
            return {"steering": {"status": "not_requested"}}
        named = {"plan": _plan(asked["steering"]), "bundles": list(self.bundles)}
        if not done:
            return {"steering": {"status": "requested", **named}}
        n_words = len(self.text.split())
        counts = {"prompt_tokens": 0, "completion_tokens": n_words, "cached_prompt_tokens": 0}
        norms = {"gate_firings": 0, "special_tokens": 0, "max_relative_norm": 0.1, "mean_relative_norm": 0.1}
        proof = {**counts, **norms}
        return {"steering": {"status": "applied", **named, **proof, "hook_points": {HOOK_POINT: proof}}}

    def _whole(self, asked: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": self.text}} if chat else {"text": self.text}
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None, **said}
        n_words = len(self.text.split())
        usage = {"prompt_tokens": 1, "completion_tokens": n_words, "total_tokens": 1 + n_words}
        return {
            **_head(asked, "chat.completion" if chat else "text_completion"),
            "choices": [choice],
            "usage": usage,
            **self._steering(asked, done=True),
        }

    def _chunks(self, asked: Mapping[str, Any], chat: bool) -> Iterator[dict[str, Any]]:
        head = _head(asked, "chat.completion.chunk" if chat else "text_completion")
        words = self.text.split(" ")
        for i, word in enumerate(words):
            text = word if i == 0 else f" {word}"
            said = {"delta": {"content": text}} if chat else {"text": text}
            last = i == len(words) - 1
            choice = {"index": 0, "finish_reason": "stop" if last else None, "logprobs": None, **said}
            told = self._steering(asked, done=last) if last or i == 0 else {}
            yield {**head, "choices": [choice], **told}

    def _pieces(self, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        seed = asked.get("seed", 0)
        for i, arm in enumerate(asked["arms"]):
            own = {**asked, **({"steering": arm["steering"]} if "steering" in arm else {})}
            for chunk in self._chunks(own, "messages" in asked):
                yield {"arm": i, "name": arm["name"], "seed": seed, "chunk": chunk}


def _head(asked: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "fake", "object": kind, "created": 0, "model": asked.get("model", "fake")}


def _plan(steering: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(steering, sort_keys=True).encode()).hexdigest()[:32]


def _bundle(name: str) -> dict[str, Any]:
    about = {"content_hash": "sha256:0", "behaviour": "a fake", "model": "fake", "hook_point": HOOK_POINT}
    return {"name": name, **about, "n_latents": 0, "n_vectors": 0, "edits": [], "pinned": False}


def _events(documents: Iterator[Mapping[str, Any]]) -> httpx2.Response:
    text = "".join(f"data: {json.dumps(document)}\n\n" for document in documents) + "data: [DONE]\n\n"
    return httpx2.Response(200, content=text.encode(), headers={"content-type": "text/event-stream"})
