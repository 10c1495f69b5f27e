"""Server-sent events to a client that may read slowly or leave. Nothing here knows models."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shared.http.disconnect import abort, while_connected

KEEP_ALIVE_SECONDS = 15.0


class EventStream(Response):
    """Server-sent events from an iterator of `data:` payloads.

    With a space after the colon: huggingface_hub knows the end of a chat stream only as `data: [DONE]`.

    Args:
        close: awaited at the end whatever happens, the client's leaving included.
        keep_alive: seconds of silence after which a comment line tells proxies that the stream lives.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str],
        close: Callable[[], Awaitable[Any]],
        headers: dict[str, str],
        keep_alive: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events, self._close, self._keep_alive = events, close, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with suppress(ClientDisconnect, OSError):
                await while_connected(receive, self._pump(send))
        finally:
            await self._close()

    async def _pump(self, send: Send) -> None:
        upcoming = asyncio.ensure_future(anext(self._events, None))
        try:
            while True:
                await asyncio.wait({upcoming}, timeout=self._keep_alive)
                if not upcoming.done():
                    await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
                    continue
                payload = upcoming.result()
                if payload is None:
                    break
                await send({"type": "http.response.body", "body": f"data: {payload}\n\n".encode(), "more_body": True})
                upcoming = asyncio.ensure_future(anext(self._events, None))
        finally:
            await abort(upcoming)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
