"""Whether the database and Redis answer, asked at most once a second however many requests want to know."""

import asyncio
import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool

from shared.jobs.notification import NotificationQueue
from shared.storage.database import Database

FRESH_SECONDS = 1.0


class HealthCache:
    """The last answer of each, at most `FRESH_SECONDS` old.

    The health routes need no key, and a server that is away takes seconds to fail: without a cache, anybody could
    occupy all threads.
    """

    def __init__(
        self, database: Database, notifications: NotificationQueue, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._notifications = notifications
        self._clock = clock
        self._lock = asyncio.Lock()
        self._checked_at = float("-inf")
        self._healthy = (False, False)

    async def check(self) -> tuple[bool, bool]:
        """Whether (the database, Redis) answered within the last second."""
        async with self._lock:
            if self._clock() - self._checked_at >= FRESH_SECONDS:
                database = await run_in_threadpool(self._database.alive)
                redis = await run_in_threadpool(self._notifications.pending) is not None
                self._healthy, self._checked_at = (database, redis), self._clock()
            return self._healthy
