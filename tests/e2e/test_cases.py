"""One golden table through every transport: the same request is the same reply, or the same refusal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import Server
from trimtab.client import TrimtabError
from trimtab.client.errors import Violation
from trimtab.client.replies import SteeredChatCompletion, SteeredCompletion
from trimtab.client.rest import Rest
from trimtab.client.rpc import Grpc, channel

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "server" / "cases.json").read_text())["cases"]
DEFAULTS = {"model": "smollm2-135m-instruct", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
REPLY: dict[str, Any] = {"chat": SteeredChatCompletion, "completion": SteeredCompletion}


@pytest.fixture(scope="module")
def wires(server: Server) -> Iterator[dict[str, Rest | Grpc]]:
    http = Rest(openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0))
    grpc = Grpc(channel(f"grpc://{server.grpc}", 0), "none", 120.0)
    yield {"http": http, "grpc": grpc}
    http.close()
    grpc.close()


def outcome(wire: Rest | Grpc, case: dict[str, Any]) -> Any:
    """What a case comes to: what can be compared of a reply, or code and fields of a refusal."""
    verb = case["verb"]
    try:
        if verb not in REPLY:
            return wire.ask(verb, case["body"])
        reply = wire.generate(verb, {**DEFAULTS, **case["body"]}, REPLY[verb])
    except TrimtabError as e:
        return refusal(e.code, e.violations, e.param)
    except openai.APIStatusError as e:
        listed = (e.body or {}).get("violations", []) if isinstance(e.body, dict) else []
        return refusal(e.code, tuple(Violation(v["field"], v["message"]) for v in listed), e.param)
    said = [choice.message.content if verb == "chat" else choice.text for choice in reply.choices]
    steering = {name: reply.model_extra["steering"].get(name) for name in ("status", "plan", "bundles")}
    return {
        "said": said,
        "steering": steering,
        "counts": reply.model_extra["steering"],
        "usage": reply.usage.total_tokens,
    }


def refusal(code: str | None, violations: tuple[Violation, ...], param: str | None) -> dict[str, Any]:
    return {"code": code, "fields": sorted(v.field for v in violations) or [param]}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_case_is_the_same_over_http_and_grpc(wires: dict[str, Rest | Grpc], case: dict[str, Any]) -> None:
    found = {name: outcome(wire, case) for name, wire in wires.items()}
    if "code" in case:
        expected = {"code": case["code"], "fields": sorted(case["fields"])}
        assert found == {"http": expected, "grpc": expected}
        return
    if "applied" in case:
        counts = {name: reply.pop("counts") for name, reply in found.items()}
        for told in counts.values():
            assert told["status"] == ("not_requested" if case["applied"] is None else "applied")
            assert {name: told[name] for name in case["applied"] or ()} == (case["applied"] or {})
    if case["verb"] in REPLY:
        assert found["grpc"] == found["http"]
    elif case["verb"] == "bundle":  # over HTTP it is the header, over gRPC the line of a listing and the latents
        assert_within(found["grpc"]["latents"], found["http"]["latents"])
    else:  # the JSON of HTTP says more
        assert_within(found["grpc"], found["http"])


def assert_within(part: Any, whole: Any) -> None:
    """Whether all that `part` says is in `whole`."""
    if isinstance(part, dict):
        for name, value in part.items():
            assert_within(value, whole.get(name))
    elif isinstance(part, list | tuple):
        for one, other in zip(part, whole, strict=True):
            assert_within(one, other)
    else:
        assert part == whole
