"""Notifies workers beside the request, so that creating a job never waits for Redis."""

import queue
import threading

from shared.jobs.notification import NotificationQueue


class Notifier:
    """A thread that sends one notification per call of `notify`.

    While Redis is away notifications are dropped: the reaper makes up for them.
    """

    def __init__(self, notifications: NotificationQueue) -> None:
        self._notifications = notifications
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def notify(self) -> None:
        """Returns at once."""
        self._wanted.put(True)

    def stop(self) -> None:
        self._wanted.put(False)
        self._thread.join()

    def _run(self) -> None:
        redis_is_there = True
        while self._wanted.get():
            # After a failure, what has piled up meanwhile is passed over instead of waiting for Redis once each.
            if redis_is_there or self._wanted.empty():
                redis_is_there = self._notifications.notify()
