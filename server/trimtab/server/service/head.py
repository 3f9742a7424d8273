"""The HTTP protocol with a bound on a request's head: uvicorn's own buffers a header without end before the app sees any."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["MAX_HEAD_BYTES", "BoundedHead"]

MAX_HEAD_BYTES = 64 << 10
"""Twice what the edge takes, so that what is a little too much still gets its 431."""


class BoundedHead(HttpToolsProtocol):
    """Ends a connection whose request line and headers do not end."""

    _n_bytes = 0
    _is_whole = False

    def on_message_begin(self) -> None:
        """A request begins."""
        self._n_bytes, self._is_whole = 0, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is whole; the rest is its body."""
        self._is_whole = True
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        super().data_received(data)
        self._n_bytes += len(data)
        if not self._is_whole and self._n_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the request's head is over {MAX_HEAD_BYTES} bytes")
