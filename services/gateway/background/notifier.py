"""Rings the doorbell beside the request, so that creating a job never waits for Redis."""

import queue
import threading

from shared.jobs.notification import Doorbell


class Ringer:
    """A thread that rings once per call of `ring`.

    While Redis is away rings are dropped: the reaper makes up for them.
    """

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ringer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ring(self) -> None:
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
                redis_is_there = self._doorbell.ring()
