"""The client's end of a request: work that stops when it leaves, and event streams that do.

Nothing here knows models. Pure ASGI: the disconnect is read from `receive`, for streams and plain answers alike.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
KEEP_ALIVE_SECONDS = 15.0


class ClientGone(Exception):
    """The client closed the connection; nobody reads the answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientGone: it left first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _end(task)
        await _end(watch)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: "asyncio.Future[Any]") -> None:
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


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
            with suppress(ClientGone, OSError):
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
            await _end(upcoming)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
