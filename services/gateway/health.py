"""Whether the database and Redis answer, asked at most once a second however many ask us."""

import asyncio
import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool

from shared.jobs.notification import NotificationQueue
from shared.storage.database import Database

FRESH_SECONDS = 1.0


class Pulse:
    """Health is asked for without a key, and a server that is away takes seconds to not answer."""

    def __init__(
        self, database: Database, notifications: NotificationQueue, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._notifications = notifications
        self._clock = clock
        self._lock = asyncio.Lock()
        self._felt_at = float("-inf")
        self._felt = (False, False)

    async def feel(self) -> tuple[bool, bool]:
        """Whether (the database, Redis) answered within the last second."""
        async with self._lock:
            if self._clock() - self._felt_at >= FRESH_SECONDS:
                database = await run_in_threadpool(self._database.alive)
                redis = await run_in_threadpool(self._notifications.pending) is not None
                self._felt, self._felt_at = (database, redis), self._clock()
            return self._felt
