"""A thread beside the requests that does one thing again and again."""

import threading
from collections.abc import Callable

from shared.logs import get_logger


class Periodic:
    """Calls `work` every `seconds`, and at once after `wake`, until it is stopped. A failure is logged and goes by.

    Args:
        seconds: None to wait for `wake` alone.
    """

    def __init__(self, name: str, work: Callable[[], object], seconds: float | None = None) -> None:
        self._name = name
        self._work = work
        self._seconds = seconds
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Returns at once."""
        self._wake.set()

    def stop(self) -> None:
        """Waits for the call that is under way; harmless if there was no start."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._seconds)
            if self._stopping:
                return
            self._wake.clear()
            try:
                self._work()
            except Exception:
                # The database, Redis or the mount may be away for a while; the next call sees.
                get_logger(self._name).exception("background work failed")
