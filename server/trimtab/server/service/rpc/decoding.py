"""Bytes that are no message of the contract end a call with a typed error; grpc itself answers UNKNOWN and logs a traceback."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from google.protobuf.message import DecodeError

__all__ = ["typed"]

Refuse = Callable[[Any], Awaitable[None]]
"""Ends the call of this context."""
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def typed(handler: Any, refuse: Refuse) -> Any:
    """The same handler, which is not called with what cannot be decoded."""
    decode = handler.request_deserializer
    if decode is None:
        return handler

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as e:
            return e  # The call is told by what asks for its messages: here there is no context yet.

    kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
    inner = getattr(handler, kind)
    checked = _stream if kind.startswith("stream") else _message
    return handler._replace(request_deserializer=decoded, **{kind: _guarded(inner, checked, refuse)})


def _guarded(inner: Any, checked: Callable[[Any, Any, Refuse], Awaitable[Any]], refuse: Refuse) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        return await inner(await checked(request, context, refuse), context)

    async def answers(request: Any, context: Any) -> AsyncIterator[Any]:
        async with aclosing(inner(await checked(request, context, refuse), context)) as replies:
            async for reply in replies:
                yield reply

    return answers if inspect.isasyncgenfunction(inner) else answer


async def _message(request: Any, context: Any, refuse: Refuse) -> Any:
    if isinstance(request, DecodeError):
        await refuse(context)
    return request


async def _stream(requests: AsyncIterator[Any], context: Any, refuse: Refuse) -> AsyncIterator[Any]:
    async def whole() -> AsyncIterator[Any]:
        async for request in requests:
            yield await _message(request, context, refuse)

    return whole()
