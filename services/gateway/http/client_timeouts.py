"""Timeouts for clients that never finish what they send: uvicorn alone would wait for ever.

A client has a fixed time for the head of a request; after that its body must make progress. Nothing limits how long an
answer takes, nor how long an upload takes that makes progress.
"""

import asyncio
from typing import ClassVar, Literal

import h11

from services.gateway.http.body_backpressure import BackpressureProtocol

_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class TimeoutProtocol(BackpressureProtocol):
    """uvicorn's HTTP/1.1 with timeouts.

    Attributes:
        head_seconds: from the connection, or from the first byte of a later request, to the end of the headers.
        body_seconds, body_bytes: in each such time at least so many bytes of a body must come, or its end.
    """

    head_seconds: ClassVar[float] = 20.0
    body_seconds: ClassVar[float] = 30.0
    body_bytes: ClassVar[int] = 4096

    _waiting: Literal["", "head", "body"] = ""
    _received = 0
    _seen = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait("")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        state = self.conn.their_state
        waiting: Literal["", "head", "body"] = "head" if state is h11.IDLE else "body" if state is h11.SEND_BODY else ""
        if waiting != self._waiting:
            self._wait(waiting)

    def _wait(self, waiting: Literal["", "head", "body"]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting, self._seen = waiting, self._received
        if waiting:
            seconds = self.head_seconds if waiting == "head" else self.body_seconds
            self._timer = self.loop.call_later(seconds, self._timed_out)

    def _timed_out(self) -> None:
        # While this server does not read, the client is not at fault.
        if self._waiting == "body" and (self.flow.read_paused or self._received - self._seen >= self.body_bytes):
            self._wait("body")
            return
        if self._waiting == "head" and self._received and not self.transport.is_closing():
            self.transport.write(_TIMEOUT)
        # To the application this looks like a client that has left.
        self.transport.close()
