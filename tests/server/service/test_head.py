import asyncio
import contextlib

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from trimtab.server.service.edge import MAX_HEADER_BYTES
from trimtab.server.service.head import MAX_HEAD_BYTES, BoundedHead


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"read"})


async def answer(*parts: bytes) -> bytes:
    """What comes back, however many of the parts are taken."""
    config = uvicorn.Config(app, port=0, http=BoundedHead, lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
    try:
        return await asyncio.wait_for(reader.read(4096), 10)
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()
        server.should_exit = True
        await serving


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nx: ", b"GET /", b"GET / HTTP/1.1\r\nx"])
async def test_a_head_without_end_ends_the_connection(start: bytes) -> None:
    parts = [b"y" * 8192] * (2 * MAX_HEAD_BYTES // 8192 + 64)
    reply = await answer(start, *parts)
    assert reply == b"reset" or reply.startswith(b"HTTP/1.1 400")


async def test_headers_without_end_end_the_connection() -> None:
    parts = [b"x-%d: y\r\n" % i for i in range(20_000)]
    reply = await answer(b"GET / HTTP/1.1\r\n", *parts)
    assert reply == b"reset" or reply.startswith(b"HTTP/1.1 400")


async def test_a_long_body_is_no_long_head() -> None:
    body = b"z" * (4 * MAX_HEAD_BYTES)
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    assert (await answer(head, body)).startswith(b"HTTP/1.1 200")


async def test_a_head_as_long_as_the_edge_takes_is_read() -> None:
    head = b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * MAX_HEADER_BYTES + b"\r\n\r\n"
    assert (await answer(head)).startswith(b"HTTP/1.1 200")
