"""Whether the database, Redis and workers are well, asked at most once a second however many requests want to know."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from shared.jobs.notification import NotificationQueue
from shared.jobs.worker_outages import WorkerOutage, WorkerOutages

FRESH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Health:
    """What was found.

    Attributes:
        database, redis: whether they answered.
        worker_outages: None if the database did not answer.
    """

    database: bool
    redis: bool
    worker_outages: list[WorkerOutage] | None


class HealthCache:
    """The last answer of each, at most `FRESH_SECONDS` old.

    The health routes need no key, and a server that is away takes seconds to fail: without a cache, anybody could
    occupy all threads.
    """

    def __init__(
        self,
        worker_outages: WorkerOutages,
        notifications: NotificationQueue,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker_outages = worker_outages
        self._notifications = notifications
        self._clock = clock
        self._lock = asyncio.Lock()
        self._checked_at = float("-inf")
        self._health = Health(False, False, None)

    async def check(self) -> Health:
        """What was found within the last second."""
        async with self._lock:
            if self._clock() - self._checked_at >= FRESH_SECONDS:
                self._health = await run_in_threadpool(self._look)
                self._checked_at = self._clock()
            return self._health

    def _look(self) -> Health:
        try:
            outages = self._worker_outages.read()
        except SQLAlchemyError:
            outages = None
        return Health(outages is not None, self._notifications.pending() is not None, outages)
