"""A real HTTP server that answers like a judge, badly at first: what a flaky endpoint does to a run."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def judge_server(answers: list[tuple[int, str]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base URL, requests seen): the answers are given in turn as (status, content), the last one for ever."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, content = answers[min(len(seen), len(answers)) - 1]
            choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            reply: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": "j"}
            body = json.dumps(
                reply | {"choices": [choice], "usage": usage} if status == 200 else {"error": {"message": content}}
            )
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
