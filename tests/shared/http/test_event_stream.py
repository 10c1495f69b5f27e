"""Server-sent events as they go over the wire."""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Message

from shared.http.event_stream import DONE, EventStreamResponse, encode_event


def test_events_have_a_space_after_the_colon_and_an_id_if_given() -> None:
    assert encode_event(DONE) == b"data: [DONE]\n\n"
    assert encode_event('{"a":1}', "ftevent-7") == b'id: ftevent-7\ndata: {"a":1}\n\n'


def test_a_silent_stream_says_that_it_lives() -> None:
    """Comment lines while nothing comes, which every reader of event streams skips; then the events, whole."""
    sent: list[bytes] = []
    closed: list[bool] = []

    async def events() -> AsyncIterator[str]:
        yield "one"
        await asyncio.sleep(0.1)
        yield "two"

    async def close() -> None:
        closed.append(True)

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    asyncio.run(EventStreamResponse(events(), close, {}, keep_alive=0.02)({"type": "http"}, receive, send))
    text = b"".join(sent)
    assert text.count(b": keep-alive\n\n") >= 2
    assert text.replace(b": keep-alive\n\n", b"") == b"data: one\n\ndata: two\n\n"
    assert closed == [True]
