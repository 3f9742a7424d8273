from collections.abc import AsyncIterator

import pytest

from trimtab.server.errors import InvalidRequest
from trimtab.server.service.body import MAX_BODY_BYTES, MAX_DEPTH, BodyTooLarge, decode, read

JSON = {"content-type": "application/json; charset=utf-8"}


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_body_is_its_chunks() -> None:
    assert await read(chunks(b'{"a"', b":1}"), JSON) == b'{"a":1}'


async def test_a_declared_length_is_refused_before_anything_is_read() -> None:
    async def untouched() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    with pytest.raises(BodyTooLarge, match="this route reads 8388608"):
        await read(untouched(), {**JSON, "content-length": str(MAX_BODY_BYTES + 1)})


async def test_a_body_that_lies_about_its_length_is_refused_as_it_arrives() -> None:
    with pytest.raises(BodyTooLarge):
        await read(chunks(*[b"x" * (1 << 20)] * 9), {**JSON, "content-length": "10"})


@pytest.mark.parametrize("media", ["text/plain", "", "application/x-www-form-urlencoded"])
async def test_what_a_web_page_may_post_anywhere_is_not_read(media: str) -> None:
    with pytest.raises(InvalidRequest, match="must be application/json"):
        await read(chunks(b"{}"), {"content-type": media})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "no valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"\xff", "no valid JSON"),
        (b'{"a":' * 100_000, "nested more than 64 deep"),
        (b'{"steering": {"bundle": "calm"}, "steering": null}', "key 'steering' is given twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"model": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b'{"model": "\xed\xa0\x80"}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_json_object_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decode(text)


def test_whole_surrogate_pairs_and_text_that_looks_like_a_half_are_text() -> None:
    assert decode(rb'{"a": "\ud83d\ude00", "b": "\\ud800"}') == {"a": "\U0001f600", "b": "\\ud800"}


def test_every_number_that_is_not_finite_is_named_by_its_path() -> None:
    with pytest.raises(InvalidRequest) as error:
        decode(b'{"temperature": -Infinity, "steering": {"edits": [{"amount": NaN}, {"target": 1e999}]}, "n": 1.5}')
    assert [v.field for v in error.value.violations] == [
        "temperature",
        "steering.edits[0].amount",
        "steering.edits[1].target",
    ]


def test_json_is_json() -> None:
    assert decode(b'{"a": [1, 2.5, "x", null, true], "b": {"c": -1e3}}') == {
        "a": [1, 2.5, "x", None, True],
        "b": {"c": -1000.0},
    }


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_body_nested_too_deeply_is_refused_before_it_is_parsed(opening: bytes) -> None:
    closing = {b"[": b"]", b'{"a":': b"}"}[opening]

    def nested(depth: int) -> bytes:
        return b'{"x":' + opening * (depth - 1) + b"1" + closing * (depth - 1) + b"}"

    assert decode(nested(MAX_DEPTH))
    for text in (nested(MAX_DEPTH + 1), nested(100_000), opening * 1_000_000):
        with pytest.raises(InvalidRequest, match="nested more than 64 deep"):
            decode(text)


def test_brackets_in_text_are_no_nesting() -> None:
    assert decode(b'{"prompt": "' + b'[{\\"' * 1000 + b'"}')
    assert decode(b'{"prompt": [' + b"[]," * 1000 + b"[]]}")
