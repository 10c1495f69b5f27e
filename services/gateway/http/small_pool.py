"""A few slots for requests that compute for long, so that everybody else's find a thread and the interpreter free."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from shared.errors import Overloaded

AT_ONCE = 2
MOST_WAITING = 16
LOOK_SECONDS = 0.25

Check = Callable[[], None]
"""Asked between pieces of work; raises `ClientDisconnect` when nobody waits for the result any more."""
T = TypeVar("T")


class SmallPool:
    """Runs work in threads, `at_once` at a time; `waiting` more may wait, beyond that requests are refused."""

    def __init__(self, at_once: int = AT_ONCE, waiting: int = MOST_WAITING) -> None:
        self._slots = asyncio.Semaphore(at_once)
        self._most = at_once + waiting
        self._inside = 0

    async def run(self, request: Request, work: Callable[[Check], T]) -> T:
        """The result of `work`, in its turn.

        Raises:
            Overloaded: too many wait already.
            ClientDisconnect: the request's client has gone away.
        """
        if self._inside >= self._most:
            raise Overloaded("too many previews and estimates at once; try again in a moment", retry_after=2)
        left = threading.Event()

        def check() -> None:
            if left.is_set():
                raise ClientDisconnect

        def unless_left() -> T:
            check()
            return work(check)

        self._inside += 1
        watching = asyncio.create_task(_watch(request, left))
        try:
            async with self._slots:
                return await run_in_threadpool(unless_left)
        finally:
            watching.cancel()
            self._inside -= 1


async def _watch(request: Request, left: threading.Event) -> None:
    # Starlette tells of a disconnection only when asked.
    while True:
        if await request.is_disconnected():
            left.set()
            return
        await asyncio.sleep(LOOK_SECONDS)
