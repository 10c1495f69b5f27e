"""Work that nobody waits for any more stops; what is done is kept."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from shared.http.disconnect import while_connected


def test_the_result_comes_back_and_a_failure_too() -> None:
    async def scenario() -> None:
        async def four() -> int:
            return 4

        async def broken() -> int:
            raise ValueError("no")

        assert await while_connected(silent, four()) == 4
        with pytest.raises(ValueError, match="no"):
            await while_connected(silent, broken())
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


def test_work_ends_before_the_disconnect_is_told() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def endless() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0)
                ended.set()

        # The rest of a body, and then nobody.
        messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

        async def leaving() -> Message:
            return next(messages)

        with pytest.raises(ClientDisconnect):
            await while_connected(leaving, endless())
        assert ended.is_set()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


def test_who_is_cancelled_takes_the_work_along() -> None:
    async def scenario() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def endless() -> None:
            begun.set()
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()

        outer = asyncio.create_task(while_connected(silent, endless()))
        await begun.wait()
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        assert ended.is_set()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


async def silent() -> Message:
    await asyncio.sleep(3600)
    raise AssertionError
