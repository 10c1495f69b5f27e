"""Request bodies that nobody wants to read: what is left unread, and how such a connection ends."""

import asyncio
from typing import ClassVar

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# What a client may still be sending at this size is on its way already; reading it costs less than a new connection.
SMALL_BODY_BYTES = 64 << 10


class AskedProtocol(H11Protocol, asyncio.BufferedProtocol):
    """uvicorn's HTTP/1.1, receiving a body only once the application asks for it.

    Otherwise the server would have up to 320 KiB of an upload in memory before the application says that it may not be
    sent: asyncio receives 256 KiB at a time, and uvicorn stops at 64 KiB. What came with the head is all that comes
    before; so long as a head may be under way, little is received at a time.
    """

    head_piece: ClassVar[int] = 16 << 10
    body_piece: ClassVar[int] = 256 << 10

    _buffer = bytearray()
    _held: RequestResponseCycle | None = None

    def get_buffer(self, sizehint: int) -> bytearray:
        size = self.body_piece if self.conn.their_state is h11.SEND_BODY else self.head_piece
        if len(self._buffer) != size:
            self._buffer = bytearray(size)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.SEND_BODY and self.cycle is not self._held:
            # Once for each request; uvicorn resumes when the application receives, or has answered.
            self._held = self.cycle
            self.flow.pause_reading()


class CloseUnread:
    """ASGI middleware: an answer given before a large body was read says `Connection: close`.

    Without it the server would go on to receive, only to throw away, all of an upload that it has refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_large(scope):
            await self._app(scope, receive, send)
            return
        unread = True

        async def receive_and_note() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                unread = False
            return message

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and unread:
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive_and_note, send_and_close)


def _is_large(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    return b"transfer-encoding" in headers or not length.isdigit() or int(length[:19]) > SMALL_BODY_BYTES
