"""Asks each inference process what it serves, on a clock of its own: no request ever waits for a process that is away.

A process that does not answer its `/info` in time counts as down until it does. Each has a task of its own, so that one
that hangs delays what is known of no other.
"""

import asyncio

import httpx
from pydantic import ValidationError

from services.gateway.inference.replicas import Replica, Replicas
from shared.logs import get_logger

# The longest time from a process's recovery to its first request is the sum of the timeout and the pause.
TIMEOUT_SECONDS = 5.0
PAUSE_WHILE_UP_SECONDS = 2.0
PAUSE_WHILE_DOWN_SECONDS = 0.5
# A gateway that starts beside healthy processes knows them before its first request.
FIRST_LOOK_SECONDS = 1.0


class Prober:
    """Keeps the state of `replicas` fresh from `start` to `stop`."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._tasks: list[asyncio.Task[None]] = []
        self._log = get_logger("prober")

    async def start(self) -> None:
        """Begin to probe; return when every process has been asked once, or after `FIRST_LOOK_SECONDS`."""
        asked = [asyncio.Event() for _ in self._replicas.all]
        self._tasks = [
            asyncio.create_task(self._watch(replica, done), name=f"prober {replica.url}")
            for replica, done in zip(self._replicas.all, asked, strict=True)
        ]
        try:
            async with asyncio.timeout(FIRST_LOOK_SECONDS):
                for done in asked:
                    await done.wait()
        except TimeoutError:
            # Who is late is found by its own task.
            return

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, replica: Replica, asked: asyncio.Event) -> None:
        while True:
            try:
                await self.probe(replica)
            except Exception:
                self._log.exception("probe failed", url=replica.url)
            asked.set()
            await asyncio.sleep(PAUSE_WHILE_UP_SECONDS if replica.base else PAUSE_WHILE_DOWN_SECONDS)

    async def probe(self, replica: Replica) -> None:
        """Ask one process once, and note the answer."""
        try:
            # Over all of the exchange: httpx's own limits are per read, and a byte now and then would satisfy them.
            async with asyncio.timeout(TIMEOUT_SECONDS):
                info = await self._replicas.ask(replica)
        except TimeoutError:
            self._replicas.mark_down(replica, f"no answer to /info within {TIMEOUT_SECONDS:g} s")
        except (httpx.HTTPError, ValidationError) as error:
            self._replicas.mark_down(replica, str(error) or type(error).__name__)
        else:
            self._replicas.mark_up(replica, info)
