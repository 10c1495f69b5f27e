"""The recipe's session with the job store: a lease renewed beside the training, and writes that carry its token.

Knows leases; knows nothing of torch or of what is trained.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from sqlalchemy.exc import SQLAlchemyError

from services.trainer.contract import EventType, Level
from services.trainer.worker.retry import with_retries
from services.trainer.worker.stall import StallDetector
from shared.errors import LeaseLost
from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.rows import NewEvent
from shared.jobs.spec import Phase, Progress, RequestedAction
from shared.logs import get_logger

PROGRESS_SECONDS = 0.5


class LeaseSession:
    """Implements `services.trainer.contract.Session` over one lease; use as a context manager.

    A thread renews the lease, since a step may take longer than the reaper waits. It stops by itself when the training
    hangs.

    Args:
        handover: true when this worker is to release its job (shutdown).
        clock: monotonic seconds.
    """

    def __init__(
        self,
        leases: Leases,
        lease: Lease,
        *,
        handover: Callable[[], bool],
        renew_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._lease = lease
        self._handover = handover
        self._renew_seconds = renew_seconds
        self._clock = clock
        self._claimed = clock()
        self._stall = StallDetector(clock)
        self._training_since: float | None = None
        self._progress_written = float("-inf")
        self._progress: Progress | None = None
        self._unwritten: list[NewEvent] = []
        self._requested = RequestedAction.NONE
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_done, name="lease", daemon=True)
        self._log = get_logger("session")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def renewing(self) -> bool:
        """Whether the lease is still being renewed."""
        return self._thread.is_alive()

    def phase(self, phase: Phase) -> None:
        self._stall.moved()
        with_retries(lambda: self._leases.record(self._lease, phase=phase), abort=self._handover)
        if phase is Phase.TRAINING and self._training_since is None:
            self._training_since = self._clock()

    def progress(self, progress: Progress) -> None:
        """Written at most twice a second: steps of a tiny model must not wait for the disk."""
        now = self._clock()
        self._stall.step_done()
        self._progress = progress
        if now - self._progress_written >= PROGRESS_SECONDS:
            self._write()

    def event(
        self, message: str, *, level: Level = "info", type: EventType = "message", data: dict[str, Any] | None = None
    ) -> None:
        self._write(NewEvent(message, level, type, data))
        self._log.info("event", message=message, level=level, data=data)

    def first_step(self, *, base_loaded: bool) -> None:
        done = round(self._clock() - self._claimed, 3)
        begun = round((self._training_since or self._claimed) - self._claimed, 3)
        base = "after loading the base model" if base_loaded else "with the base model already warm"
        self.event(
            f"First optimizer step begun {begun:.1f} s and done {done:.1f} s after the claim, {base}",
            data={
                "claim_to_training_seconds": begun,
                "claim_to_first_step_seconds": done,
                "base_loaded": base_loaded,
            },
        )

    def should_stop(self) -> bool:
        """Asked between micro-batches and rows, so it is a sign of movement too.

        Raises:
            LeaseLost: the job is another worker's by now.
        """
        self._stall.moved()
        if self._lost:
            raise LeaseLost(f"the lease on {self._lease.job.id} is gone")
        return self._requested is not RequestedAction.NONE or self._handover()

    def reserve_adapter(self) -> str:
        return with_retries(lambda: self._leases.reserve_adapter(self._lease), abort=self._handover)

    def commit_checkpoint(self, *, step: int, adapter_id: str, metrics: dict[str, float]) -> None:
        self._stall.moved()
        with_retries(
            lambda: self._leases.commit_checkpoint(self._lease, step, adapter_id, metrics), abort=self._handover
        )

    def flush(self) -> None:
        """Write the progress and the events that are not written yet."""
        if self._progress is not None or self._unwritten:
            events, progress = self._unwritten, self._progress
            with_retries(lambda: self._leases.record(self._lease, events, progress=progress), abort=self._handover)
            self._progress, self._unwritten = None, []

    def _write(self, *events: NewEvent) -> None:
        """Write events and the latest progress; if the database is away, they go with the next write."""
        self._unwritten += events
        try:
            self._leases.record(self._lease, self._unwritten, progress=self._progress)
        except SQLAlchemyError as error:
            self._log.warning("events not written yet", count=len(self._unwritten), error=str(error))
            return
        self._unwritten = []
        self._progress = None
        self._progress_written = self._clock()

    def _renew_until_done(self) -> None:
        while not self._done.wait(self._renew_seconds):
            if self._stall.stalled():
                self._log.error("training hangs; the lease is left to expire")
                return
            try:
                self._requested = self._leases.renew(self._lease)
            except LeaseLost:
                self._lost = True
                return
            except SQLAlchemyError as error:
                # The database may be away for less time than the reaper waits.
                self._log.warning("lease not renewed", error=str(error))
