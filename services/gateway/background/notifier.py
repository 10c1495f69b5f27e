"""Notifies workers, on a thread of its own: neither a request nor the reaper ever waits for Redis."""

import threading
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from services.gateway.background.periodic import Periodic
from shared.jobs.notification import NotificationQueue
from shared.logs import get_logger

CHECK_EVERY_SECONDS = 5.0


class Notifier:
    """Sends one notification per call of `notify`, and those that jobs wait without.

    While Redis is away notifications are dropped; they are made up for when it is back.

    Args:
        queued: how many jobs wait for a worker.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        notifications: NotificationQueue,
        queued: Callable[[], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notifications = notifications
        self._queued = queued
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted = 0
        self._last_check = float("-inf")
        self._log = get_logger("notifier")
        self._thread = Periodic("notifier", self.tick, CHECK_EVERY_SECONDS)

    def start(self) -> None:
        self._thread.start()

    def notify(self) -> None:
        """Returns at once."""
        with self._lock:
            self._wanted += 1
        self._thread.wake()

    def tick(self) -> None:
        """Send what is wanted; every few seconds make up for what was lost."""
        due = self._clock() - self._last_check >= CHECK_EVERY_SECONDS
        # Counted before what is wanted is sent: a job of in between would be notified of twice.
        waiting = self._queued_if_known() if due else 0
        self._send()
        if due:
            self._last_check = self._clock()
            self._make_up(waiting)

    def _queued_if_known(self) -> int:
        try:
            return self._queued()
        except SQLAlchemyError as error:
            self._log.warning("queued jobs not counted", error=str(error))
            return 0

    def stop(self) -> None:
        """Sends what is still wanted."""
        self._thread.stop()
        self._send()

    def _send(self) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, 0
        for _ in range(wanted):
            if not self._notifications.notify():
                # Redis is away: the others would wait for it once each.
                return

    def _make_up(self, waiting: int) -> None:
        pending = self._notifications.pending() if waiting else None
        for _ in range(max(0, waiting - pending) if pending is not None else 0):
            if not self._notifications.notify():
                return
