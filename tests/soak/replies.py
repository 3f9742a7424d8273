"""What came back, and whether it is what had to."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from tests.soak.traffic import Ask
from trimtab.server.engine.proof import expected
from trimtab.server.plan import Plan

__all__ = ["Ledger", "Refusal", "Reply", "read_stream", "read_whole"]


class Reply(NamedTuple):
    """A finished generation."""

    n_prompt: int
    tokens: list[list[int]]
    """Of each choice."""
    steering: dict[str, Any]
    texts: list[str]


class Refusal(NamedTuple):
    """An error document."""

    status: int
    code: str


def read_whole(response: httpx.Response) -> Reply | Refusal:
    """A reply that is not a stream."""
    document = response.json()
    if response.status_code != 200:
        return Refusal(response.status_code, document["error"]["code"])
    choices = sorted(document["choices"], key=lambda choice: choice["index"])
    tokens = [choice["token_ids"] for choice in choices]
    return Reply(document["usage"]["prompt_tokens"], tokens, document["steering"], [c["text"] for c in choices])


async def read_stream(lines: AsyncIterator[str], leave_after: float | None = None) -> Reply | Refusal | None:
    """A stream to its end; None when the client left it after so many chunks."""
    tokens: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    steering: dict[str, Any] = {}
    n_prompt = n_chunks = 0
    async for line in lines:
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            order = sorted(tokens)
            return Reply(n_prompt, [tokens[i] for i in order], steering, [texts[i] for i in order])
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            return Refusal(500, chunk["error"]["code"])
        for choice in chunk["choices"]:
            n_prompt = len(choice.get("prompt_token_ids") or ()) or n_prompt
            tokens.setdefault(choice["index"], []).extend(choice["token_ids"] or ())
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        steering = chunk.get("steering", steering)
        n_chunks += 1
        if leave_after is not None and n_chunks > leave_after:
            return None
    return Refusal(0, "cut off")


@dataclass
class Ledger:
    """Every answer of the soak, and everything that was wrong."""

    kinds: dict[str, int] = field(default_factory=dict)
    """How the requests ended, by kind and ending."""
    wrong: list[str] = field(default_factory=list)
    greedy: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """The longest greedy answer to each (prompt, plan)."""
    asked: dict[tuple[str, str], Ask] = field(default_factory=dict)
    """A request for it; those of the moving bundle are not kept, it is gone at the end."""
    n_answered: int = 0
    n_tokens: int = 0

    def enter(self, ask: Ask, reply: Reply | Refusal | None, moving: dict[str, Plan]) -> None:
        """Check a reply and keep it; `moving` are the plans of the moving bundle's versions, by hash."""
        self.n_answered += 1
        match reply:
            case None:
                ending = "left"
            case Refusal(status, code):
                ending = f"{status} {code}"
                if ask.kind == "moving":
                    allowed = {(404, "unknown_bundle")}
                else:
                    allowed = {(400, "invalid_steering"), (400, "invalid_request"), (404, "unknown_bundle")}
                if ask.kind not in ("refused", "moving") or (status, code) not in allowed:
                    self.wrong.append(f"{ask.kind}: {status} {code}; {ask.body}")
            case Reply():
                ending = reply.steering.get("status", "no proof")
                self.n_tokens += sum(map(len, reply.tokens))
                self._check(ask, reply, moving)
        name = f"{ask.kind}: {ending}"
        self.kinds[name] = self.kinds.get(name, 0) + 1

    def _check(self, ask: Ask, reply: Reply, moving: dict[str, Plan]) -> None:
        def wrong(what: str) -> None:
            self.wrong.append(f"{ask.kind}: {what}; {ask.body}")

        if ask.kind == "refused":
            wrong("was answered")
            return
        if "steering" not in ask.body:
            if reply.steering != {"status": "not_requested"}:
                wrong(f"says {reply.steering}")
        else:
            plan = ask.plan or moving.get(reply.steering.get("plan", ""))
            if reply.steering.get("status") != "applied" or plan is None or reply.steering["plan"] != plan.hash:
                wrong(f"says {reply.steering}")
                return
            counts = [expected(plan, reply.n_prompt, len(tokens)) for tokens in reply.tokens]
            for name, point in reply.steering["hook_points"].items():
                wanted = [sum(pair) for pair in zip(*(count[name] for count in counts), strict=True)]
                if [point["prompt_tokens"] + point["cached_prompt_tokens"], point["completion_tokens"]] != wanted:
                    wrong(f"{name} proves {point} and not {wanted}")
            if ask.kind == "moving":
                self._same((ask.body["prompt"], plan.hash), reply.tokens[0], wrong)
        if ask.kind == "grammar" and not (len(reply.texts[0]) == 3 and reply.texts[0].isdigit()):
            wrong(f"says {reply.texts[0]!r}")
        if ask.key is not None:
            self.asked.setdefault(ask.key, ask)
            self._same(ask.key, reply.tokens[0], wrong)

    def _same(self, key: tuple[str, str], tokens: list[int], wrong: Any) -> None:
        known = self.greedy.setdefault(key, tokens)
        n = min(len(known), len(tokens))
        if known[:n] != tokens[:n]:
            wrong(f"said {tokens} and before {known}")
        if len(tokens) > len(known):
            self.greedy[key] = tokens
