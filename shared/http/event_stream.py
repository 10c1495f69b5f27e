"""Server-sent events: how one is written, and a response of them for a client that may read slowly or leave.

The only place that knows the format (WHATWG HTML, section "Server-sent events"). Knows no models and no jobs.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shared.http.disconnect import abort, while_connected

MEDIA_TYPE = "text/event-stream"
# What ends a stream in OpenAI's dialect, as the data of an event.
DONE = "[DONE]"
# A comment: every reader skips it, and proxies see that the connection is alive.
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0
# Headers that keep caches and proxies (nginx by the second) from holding events back.
UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def encode_event(data: str, id: str = "", name: str = "") -> bytes:
    """One event.

    With a space after the colon: huggingface_hub knows the end of a chat stream only as `data: [DONE]`.

    Args:
        data: JSON in one line, or `DONE`.
        id: what a client sends as `Last-Event-ID` to go on after this event; none if empty.
        name: the event's type; none if empty.
    """
    first = (f"id: {id}\n" if id else "") + (f"event: {name}\n" if name else "")
    return f"{first}data: {data}\n\n".encode()


def documented_events(event: type[BaseModel], *, ended_by_done: bool = False) -> dict[str, dict[str, Any]]:
    """`content` of a response in an API document: a stream of events whose data is JSON of this shape.

    Args:
        ended_by_done: whether the last event's data is `DONE`.

    `itemSchema` is OpenAPI 3.2's word; FastAPI writes it so too. A `schema` here would be that of the stream as a text.
    """
    data: dict[str, Any] = {"contentMediaType": "application/json", "contentSchema": _inlined(event)}
    if ended_by_done:
        data = {"anyOf": [{"const": DONE}, data]}
    data = {"type": "string"} | data
    item = {"type": "object", "properties": {"data": data, "id": {"type": "string"}}, "required": ["data"]}
    return {MEDIA_TYPE: {"itemSchema": item}}


def _inlined(model: type[BaseModel]) -> Any:
    """The model's schema without references: those of a document lead to models of routes, and an event is none."""
    schema = model.model_json_schema(mode="serialization")
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(definitions[node["$ref"].rsplit("/", 1)[1]])
            return {key: inline(value) for key, value in node.items()}
        return [inline(value) for value in node] if isinstance(node, list) else node

    return inline(schema)


class EventStreamResponse(Response):
    """Server-sent events from an iterator of their data.

    Args:
        events: the data of each event.
        close: awaited at the end whatever happens, the client's leaving included.
        headers: added to `UNBUFFERED`.
        keep_alive: seconds of silence after which a comment is sent.
        named: the data are JSON objects, whose `type` is the event's name too.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        events: AsyncIterator[str],
        close: Callable[[], Awaitable[Any]],
        headers: dict[str, str],
        keep_alive: float = KEEP_ALIVE_SECONDS,
        *,
        named: bool = False,
    ) -> None:
        super().__init__(headers={**UNBUFFERED, **headers})
        del self.headers["content-length"]
        self._events, self._close, self._keep_alive, self._named = events, close, keep_alive, named

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
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    continue
                data = upcoming.result()
                if data is None:
                    break
                name = json.loads(data)["type"] if self._named else ""
                await send({"type": "http.response.body", "body": encode_event(data, name=name), "more_body": True})
                upcoming = asyncio.ensure_future(anext(self._events, None))
        finally:
            await abort(upcoming)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
