"""A thread of the training process that says that it is there, from its start to its end, working or idle."""

import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from shared.jobs.workers import SAY_EVERY_SECONDS, Workers
from shared.logs import get_logger


class Presence:
    """Says so until stopped; a database that is away is tried again.

    Args:
        worker: this worker's name in events.
    """

    def __init__(self, workers: Workers, worker: str, pid: int, every_seconds: float = SAY_EVERY_SECONDS) -> None:
        self._workers = workers
        self._worker = worker
        self._pid = pid
        self._every_seconds = every_seconds
        self._stopped = threading.Event()
        # A daemon: a child that is told to end must not wait for it.
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._tell(lambda: self._workers.seen(self._worker, self._pid))
            if self._stopped.wait(self._every_seconds):
                break
        self._tell(lambda: self._workers.gone(self._worker, self._pid))

    def _tell(self, write: Callable[[], None]) -> None:
        try:
            write()
        except SQLAlchemyError as error:
            get_logger("presence").debug("not told", error=str(error))
