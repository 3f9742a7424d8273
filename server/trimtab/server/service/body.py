"""A request's body: bounded before it is read, strict JSON, parsed once."""

import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from itertools import accumulate
from typing import Any

from trimtab.server.errors import InvalidRequest, Violation

__all__ = ["MAX_BODY_BYTES", "MAX_DEPTH", "BodyTooLarge", "decode", "read"]

MAX_BODY_BYTES = 8 << 20
MAX_DEPTH = 64
"""Of arrays and objects within each other; OpenAI's requests, JSON schemas in tools included, stay far below."""
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Half a pair, maybe with the other half beside it."""
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_REST = bytes(byte for byte in range(256) if byte not in _STEPS)


class BodyTooLarge(Exception):
    """More bytes than this server reads; the message says how many it does."""


async def read(
    chunks: AsyncIterator[bytes],
    headers: Mapping[str, str],
    *,
    media: str = "application/json",
    most: int = MAX_BODY_BYTES,
) -> bytes:
    """The whole body, which must be declared as `media`: a web page cannot send that, nor JSON, to another origin unasked.

    Raises:
        InvalidRequest: by its Content-Type.
        BodyTooLarge: by its declared length, before anything is read, or by what arrives.
    """
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != media:
        raise InvalidRequest([Violation("content-type", f"must be {media}, not {given[:60] or 'absent'}")])
    declared = headers.get("content-length")
    if declared is not None and declared.isdecimal() and int(declared) > most:
        raise BodyTooLarge(f"the body is {declared} bytes; this route reads {most}, so send less")
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > most:
            raise BodyTooLarge(f"the body is over {most} bytes, which is what this route reads; send less")
    return bytes(body)


def decode(body: bytes) -> dict[str, Any]:
    """The body's JSON object, without NaN, infinities, halves of surrogate pairs (which no reply could repeat) and keys given
    twice (of which JSON keeps the last, silently).

    Raises:
        InvalidRequest: it is no such object; each non-finite number is named by its path.
    """
    if _is_too_deep(body):
        raise InvalidRequest([Violation("body", f"is nested more than {MAX_DEPTH} deep")])
    finite = True

    def number(text: str) -> float:
        nonlocal finite
        value = float(text)
        finite = finite and math.isfinite(value)
        return value

    try:
        document = json.loads(body, parse_constant=number, parse_float=number, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise InvalidRequest([Violation("body", f"is no valid JSON: {why[:200]}")]) from e
    if not isinstance(document, dict):
        raise InvalidRequest([Violation("body", f"must be a JSON object, not {type(document).__name__}")])
    if not finite:
        raise InvalidRequest(list(_non_finite(document, "")))
    if _SURROGATE.search(body) and not _is_text(document):
        raise InvalidRequest([Violation("body", "has half of a surrogate pair in a string, which is no character")])
    return document


def _is_text(document: dict[str, Any]) -> bool:
    """Whether all its strings can be written as UTF-8."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_too_deep(body: bytes) -> bool:
    """Whether the text nests more than it may, found without parsing it."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return False
    brackets = _STRINGS.sub(b"", body).translate(None, delete=_REST)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return document


def _non_finite(value: Any, path: str) -> list[Violation]:
    match value:
        case float() if not math.isfinite(value):
            return [Violation(path, f"{value} is no JSON number; give a finite one")]
        case dict():
            inner = [(item, f"{path}.{key}" if path else key) for key, item in value.items()]
        case list():
            inner = [(item, f"{path}[{i}]") for i, item in enumerate(value)]
        case _:
            return []
    return [violation for item, where in inner for violation in _non_finite(item, where)]
