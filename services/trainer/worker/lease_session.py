"""The recipe's session with the job store: a lease renewed beside the training, and writes that carry its token.

Knows leases; knows nothing of torch or of what is trained.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from sqlalchemy.exc import SQLAlchemyError

from services.trainer.contract import EventType, Level
from services.trainer.worker.activity import Activity
from services.trainer.worker.hang import end_hanging_process
from services.trainer.worker.record_writer import RecordWriter
from services.trainer.worker.retry import RETRY_FOR_SECONDS, with_retries
from services.trainer.worker.stall import StallDetector
from shared.errors import LeaseLost
from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.rows import NewEvent
from shared.jobs.spec import Phase, Progress, RequestedAction
from shared.logs import get_logger

# So long a training's end waits for what is not written yet; the job's own end is retried for longer.
END_SECONDS = 5.0
# So long a base may take to be downloaded and converted, as long as this process is at work.
PREPARING_SECONDS = 6 * 3600.0


class LeaseSession:
    """Implements `services.trainer.contract.Session` over one lease; use as a context manager.

    A thread renews the lease, since a step may take longer than the reaper waits. When the training hangs it gives the
    job back and ends the process. Another writes events, phase and progress: only reserving an adapter, committing a
    checkpoint and `flush` wait for the database.

    Args:
        handover: true when this worker is to release its job (shutdown).
        clock: monotonic seconds.
        at_work: whether this process has done something since the last question, though it reports nothing.
        on_hang: ends this process.
    """

    def __init__(
        self,
        leases: Leases,
        lease: Lease,
        *,
        handover: Callable[[], bool],
        renew_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        at_work: Callable[[], bool] | None = None,
        on_hang: Callable[[], None] = end_hanging_process,
    ) -> None:
        self._leases = leases
        self._lease = lease
        self._handover = handover
        self._renew_seconds = renew_seconds
        self._clock = clock
        self._claimed = clock()
        self._stall = StallDetector(clock)
        self._at_work = at_work or Activity().at_work
        self._on_hang = on_hang
        self._phase = Phase.PREPARING
        self._training_since: float | None = None
        self._records = RecordWriter(leases, lease)
        self._requested = RequestedAction.NONE
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_done, name="lease", daemon=True)
        self._log = get_logger("session")

    def __enter__(self) -> Self:
        # Before anything that may kill this process: a lease that was never renewed counts as not begun.
        self._renew()
        self._thread.start()
        self._records.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._records.stop(within=END_SECONDS)
        self._done.set()
        self._thread.join()

    @property
    def renewing(self) -> bool:
        """Whether the lease is still being renewed."""
        return self._thread.is_alive()

    def phase(self, phase: Phase) -> None:
        self._stall.moved()
        self._phase = phase
        self._records.put(phase=phase)
        if phase is Phase.TRAINING and self._training_since is None:
            self._training_since = self._clock()

    def progress(self, progress: Progress) -> None:
        self._stall.step_done()
        self._records.put(progress=progress)

    def event(
        self, message: str, *, level: Level = "info", type: EventType = "message", data: dict[str, Any] | None = None
    ) -> None:
        self._records.put(NewEvent(message, level, type, data))
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
        if self._lost or self._records.lost:
            raise LeaseLost(f"the lease on {self._lease.job.id} is gone")
        return self._requested is not RequestedAction.NONE or self._handover()

    def reserve_adapter(self) -> str:
        return with_retries(lambda: self._leases.reserve_adapter(self._lease), abort=self._waiting)

    def commit_checkpoint(self, *, step: int, adapter_id: str, metrics: dict[str, float]) -> Sequence[str]:
        # What led to the checkpoint stands before it in the log.
        self.flush()
        committed = with_retries(
            lambda: self._leases.commit_checkpoint(self._lease, step, adapter_id, metrics), abort=self._waiting
        )
        return committed.removed

    def flush(self) -> None:
        """Wait until all progress and events are written.

        Raises:
            LeaseLost: the job is another worker's by now.
            SQLAlchemyError: the database objects, or was away for too long.
        """
        self._records.flush(abort=self._waiting, within=RETRY_FOR_SECONDS)

    def _waiting(self) -> bool:
        """Asked between tries: waiting for the database is no hanging."""
        self._stall.moved()
        return self._handover()

    def _renew_until_done(self) -> None:
        while not self._done.wait(self._renew_seconds):
            if self._at_work() and self._preparing():
                self._stall.moved()
            if self._stall.stalled():
                self._give_up()
                return
            self._renew()
            if self._lost:
                return

    def _renew(self) -> None:
        try:
            self._requested = self._leases.renew(self._lease)
        except LeaseLost:
            self._lost = True
        except SQLAlchemyError as error:
            # The database may be away for less time than the reaper waits.
            self._log.warning("lease not renewed", error=str(error))

    def _preparing(self) -> bool:
        """Whether a base may be on its way here: that reports no steps, and is not waited for without end."""
        return self._phase is Phase.PREPARING and self._clock() - self._claimed < PREPARING_SECONDS

    def _give_up(self) -> None:
        self._log.error("training hangs; this process ends")
        try:
            self._leases.requeue(self._lease, "hung: nothing has moved for ten minutes or more; its process ends")
        except (LeaseLost, SQLAlchemyError) as error:
            # The reaper will find that the lease has expired.
            self._log.warning("could not give the job back", error=str(error))
        self._lost = True
        self._on_hang()
