"""The cases that every Trimtab client passes, whatever its language: `clients/cases.json`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.client.fakes import Answer, answers, chat_reply, transport
from trimtab.client import Edit, InvalidSteeringError, Latent, Steering, Trimtab, TrimtabError, Vector
from trimtab.client.conversation import parse_steering

CASES: dict[str, Any] = json.loads((Path(__file__).parents[2] / "clients" / "cases.json").read_text())
HI: Any = [{"role": "user", "content": "Capital of France?"}]


def each(form: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", CASES[form], ids=[case["name"] for case in CASES[form]])


def client(answer: Answer, *, retries: int = 0) -> Trimtab:
    return Trimtab("http://fake", http_client=httpx2.Client(transport=transport(answer)), max_retries=retries)


def built(case: dict[str, Any]) -> Steering:
    edits = [_edit(edit) for edit in case.get("edits", ())]
    return Steering(edits=edits, **case.get("steering", {}))


def _edit(edit: dict[str, Any]) -> Edit:
    found: Any = Latent(*edit["latent"]) if "latent" in edit else Vector(*edit["vector"])
    for name, *arguments in edit["calls"]:
        named = arguments.pop()["="] if arguments and isinstance(arguments[-1], dict) else {}
        found = getattr(found, name)(*arguments, **named)
    assert isinstance(found, Edit)
    return found


@each("specs")
def test_a_spec(case: dict[str, Any]) -> None:
    if "invalid" in case:
        with pytest.raises(InvalidSteeringError) as caught:
            built(case)
        assert caught.value.param == case["invalid"]
        return
    assert built(case).to_dict() == case["json"]
    assert parse_steering(json.dumps(case["json"])) == built(case)


def asked(case: dict[str, Any]) -> Steering | None:
    return None if case["asked"] is None else Steering(**case["asked"])


@each("proofs")
def test_a_proof(case: dict[str, Any]) -> None:
    with client(answers(chat_reply(case["steering"]))) as trimtab:

        def ask() -> Any:
            return trimtab.chat.completions.create(model="m", messages=HI, steering=asked(case)).steering

        if "error" in case:
            with pytest.raises(TrimtabError) as caught:
                ask()
            assert caught.value.code == case["error"]
            return
        applied = ask()
    assert {name: getattr(applied, name) for name in case["ok"]} == case["ok"]


@each("errors")
def test_an_error(case: dict[str, Any]) -> None:
    expected = openai.APIStatusError if case["code"] is None else TrimtabError
    answer = answers({"error": case["error"]}, status=case["status"])
    with client(answer) as trimtab, pytest.raises(expected) as caught:
        trimtab.chat.completions.create(model="m", messages=HI, steering=Steering(bundle="calm"))
    error: Any = caught.value
    assert error.param == case["param"]
    assert error.request_id == "req-7"
    if case["code"] is not None:
        assert error.code == case["code"]
        assert [violation.field for violation in error.violations] == case["violations"]


def sent(case: dict[str, Any]) -> bytes:
    lines = []
    for event in case["events"]:
        if "error" in event:
            lines.append(json.dumps(event))
            continue
        choice = {"index": 0, "delta": {"content": event["delta"]}, "finish_reason": event.get("finish")}
        told = {"steering": event["steering"]} if "steering" in event else {}
        lines.append(json.dumps({"id": "1", "object": "chat.completion.chunk", "choices": [choice], **told}))
    return "".join(f"data: {line}\n\n" for line in [*lines, *([] if case.get("cut") else ["[DONE]"])]).encode()


@each("streams")
def test_a_stream(case: dict[str, Any]) -> None:
    headers = {"content-type": "text/event-stream"}
    with client(lambda request: httpx2.Response(200, content=sent(case), headers=headers)) as trimtab:
        stream = trimtab.chat.completions.create(model="m", messages=HI, steering=asked(case), stream=True)

        def read() -> str:
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        if "error" in case:
            with pytest.raises(TrimtabError) as caught:
                read()
            assert caught.value.code == case["error"]
            return
        assert read() == case["text"]
    assert {name: getattr(stream.steering, name) for name in case["ok"]} == case["ok"]


class Broken(httpx2.SyncByteStream):
    """A body that ends with the connection."""

    def __iter__(self) -> Iterator[bytes]:
        yield b'data: {"id": "1", "choices": []}\n\n'
        raise httpx2.ReadError("the connection was lost")


@each("retries")
def test_retries(case: dict[str, Any]) -> None:
    seen = 0

    def answer(request: httpx2.Request) -> httpx2.Response:
        nonlocal seen
        status, headers = case["answers"][seen]
        seen += 1
        if status == "broken":
            return httpx2.Response(200, stream=Broken(), headers={"content-type": "text/event-stream"})
        body: Any = chat_reply({"status": "not_requested"}) if status == 200 else {"error": {"message": "no"}}
        return httpx2.Response(status, json=body, headers=headers, request=request)

    with client(answer, retries=2) as trimtab:

        def ask() -> None:
            reply: Any = trimtab.chat.completions.create(model="m", messages=HI, stream=case.get("stream", False))
            list(reply)

        if case["ok"]:
            ask()
        else:
            with pytest.raises(openai.APIError):
                ask()
    assert seen == case["requests"]
