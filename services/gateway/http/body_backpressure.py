"""Backpressure on request bodies: none is received before the application asks for it, and a connection whose body was
left unread is closed.
"""

import asyncio
from typing import ClassVar

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from services.gateway.http.unreadable_head import UnreadableHeadProtocol

# A smaller body is on its way already: reading it costs less than a new connection.
SMALL_BODY_BYTES = 64 << 10


class BackpressureProtocol(UnreadableHeadProtocol, asyncio.BufferedProtocol):
    """uvicorn's HTTP/1.1, which receives a body only once the application asks for it.

    uvicorn alone has up to 320 KiB of an upload in memory before the application can refuse it: asyncio receives 256
    KiB at a time, and uvicorn stops at 64 KiB. Here only what came together with the head is received earlier; that is
    little, since small pieces are received while a head may be on its way.

    Attributes:
        head_piece, body_piece: most bytes received at once while a head, or a body, is expected.
        chunked_piece: while a body comes in chunks. Each chunk takes time whatever is in it, and others wait: of one
            byte each, 256 KiB of them held up every other request for a second.
    """

    head_piece: ClassVar[int] = 16 << 10
    body_piece: ClassVar[int] = 256 << 10
    chunked_piece: ClassVar[int] = 8 << 10

    _buffer = bytearray()
    # The request whose body was held back when it began.
    _held: RequestResponseCycle | None = None

    def get_buffer(self, sizehint: int) -> bytearray:
        size = self._piece()
        if len(self._buffer) != size:
            self._buffer = bytearray(size)
        return self._buffer

    def _piece(self) -> int:
        if self.conn.their_state is not h11.SEND_BODY:
            return self.head_piece
        chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        return self.chunked_piece if chunked else self.body_piece

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.SEND_BODY and self.cycle is not self._held:
            # Once for each request: uvicorn resumes when the application reads the body, or has answered.
            self._held = self.cycle
            self.flow.pause_reading()


class CloseOnUnreadBody:
    """ASGI middleware: an answer that is given before a large body was read says `Connection: close`.

    Without it the server would receive and throw away the rest of an upload that it has refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_large(scope):
            await self._app(scope, receive, send)
            return
        unread = True

        async def receive_and_watch() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                unread = False
            return message

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and unread:
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive_and_watch, send_and_close)


def _is_large(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    return b"transfer-encoding" in headers or not length.isdigit() or int(length[:19]) > SMALL_BODY_BYTES
