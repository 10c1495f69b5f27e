"""A thread beside the training that writes what is to be known of it: events, phase and progress.

Training hands over what it has to say and goes on at once, however long the database is away. Writes are numbered, so
that one whose answer was lost is not done twice. Knows leases; knows nothing of what is trained.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sqlalchemy.exc import SQLAlchemyError

from shared.errors import LeaseLost
from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.rows import NewEvent
from shared.jobs.spec import Phase, Progress
from shared.logs import get_logger
from shared.storage.outages import is_away

# Progress alone is written this often at most: steps of a tiny model must not keep the disk busy.
PROGRESS_SECONDS = 0.5
RETRY_EVERY_SECONDS = 1.0
# Some hours of a metrics event a step; beyond that the oldest of them go.
MAX_WAITING_EVENTS = 10_000


@dataclass
class _Record:
    events: list[NewEvent] = field(default_factory=list)
    phase: Phase | None = None
    progress: Progress | None = None

    def __bool__(self) -> bool:
        return bool(self.events) or self.phase is not None or self.progress is not None

    @property
    def urgent(self) -> bool:
        return bool(self.events) or self.phase is not None


class RecordWriter:
    """Writes in the order of what was put, each record under the lease's token and a number that rises.

    Args:
        now: nanoseconds since the epoch; events keep the time they were put at.
    """

    def __init__(self, leases: Leases, lease: Lease, *, now: Callable[[], int] = time.time_ns) -> None:
        self._leases = leases
        self._lease = lease
        self._now = now
        self._changed = threading.Condition()
        self._waiting = _Record()
        self._writing = False
        self._flushing = 0
        self._stopping = False
        self._number = 0
        self._progress_written = float("-inf")
        self._error: Exception | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._log = get_logger("records")

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, within: float) -> None:
        """Write what waits, for `within` seconds at most, and end the thread."""
        deadline = time.monotonic() + within
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            while self._busy and not self._failed and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            lost = len(self._waiting.events)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        if lost:
            self._log.warning("events not written", count=lost)

    @property
    def lost(self) -> bool:
        """Whether a write found that the job is another worker's by now."""
        return self._failed and isinstance(self._error, LeaseLost)

    def put(self, *events: NewEvent, phase: Phase | None = None, progress: Progress | None = None) -> None:
        """Have this written; returns at once. Of phases and progress the last one counts."""
        now = self._now()
        with self._changed:
            waiting = self._waiting
            waiting.events += [replace(event, created_ns=event.created_ns or now) for event in events]
            while len(waiting.events) > MAX_WAITING_EVENTS and (old := _oldest_metrics(waiting.events)) is not None:
                del waiting.events[old]
            waiting.phase = phase or waiting.phase
            waiting.progress = progress or waiting.progress
            self._changed.notify_all()

    def flush(self, *, abort: Callable[[], bool], within: float) -> None:
        """Wait until all that was put is written.

        Args:
            abort: asked about once a second: true when there is no time to wait (shutdown).
            within: seconds.

        Raises:
            LeaseLost: the job is another worker's by now.
            SQLAlchemyError: the database objects, or was away for too long.
        """
        deadline = time.monotonic() + within
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                while self._busy:
                    if self._error is not None and (self._failed or abort() or time.monotonic() > deadline):
                        raise self._error
                    self._changed.wait(RETRY_EVERY_SECONDS)
                if self._failed and self._error is not None:
                    raise self._error
            finally:
                self._flushing -= 1

    @property
    def _busy(self) -> bool:
        return self._writing or bool(self._waiting)

    def _run(self) -> None:
        while (record := self._take()) is not None:
            self._number += 1
            written = self._write(record)
            with self._changed:
                self._writing = False
                self._failed = not written
                if self._failed:
                    self._waiting = _Record()
                self._changed.notify_all()
            if not written:
                return

    def _take(self) -> _Record | None:
        """What is to be written next; None once there is to be no more."""
        with self._changed:
            while True:
                if self._stopping:
                    return None
                due = self._progress_written + PROGRESS_SECONDS - time.monotonic()
                if self._waiting and (self._waiting.urgent or self._flushing or due <= 0):
                    record, self._waiting = self._waiting, _Record()
                    self._writing = True
                    return record
                self._changed.wait(due if self._waiting else None)

    def _write(self, record: _Record) -> bool:
        """Write a record, again and again while the database is away. False if it cannot be written at all."""
        while True:
            try:
                self._leases.record(
                    self._lease, record.events, phase=record.phase, progress=record.progress, number=self._number
                )
            except LeaseLost as error:
                self._error = error
                return False
            except SQLAlchemyError as error:
                self._error = error
                if not is_away(error):
                    self._log.exception("events cannot be written")
                    return False
                self._log.warning("events not written yet", count=len(record.events), error=str(error))
            else:
                self._error = None
                self._progress_written = time.monotonic()
                return True
            with self._changed:
                self._changed.notify_all()
                if self._changed.wait_for(lambda: self._stopping, RETRY_EVERY_SECONDS):
                    return False


def _oldest_metrics(events: list[NewEvent]) -> int | None:
    return next((index for index, event in enumerate(events) if event.type == "metrics"), None)
