"""Notifies workers beside the request, so that creating a job never waits for Redis."""

import threading

from services.gateway.background.periodic import Periodic
from shared.jobs.notification import NotificationQueue


class Notifier:
    """Sends one notification per call of `notify`, from a thread of its own.

    While Redis is away notifications are dropped: the reaper makes up for them.
    """

    def __init__(self, notifications: NotificationQueue) -> None:
        self._notifications = notifications
        self._lock = threading.Lock()
        self._wanted = 0
        self._thread = Periodic("notifier", self._send)

    def start(self) -> None:
        self._thread.start()

    def notify(self) -> None:
        """Returns at once."""
        with self._lock:
            self._wanted += 1
        self._thread.wake()

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
