"""Claim, train, record: the loop between the job store and the recipe. Knows no Celery."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog
import torch
from sqlalchemy.exc import SQLAlchemyError

from services.trainer.contract import Finished, JobRun, Outcome
from services.trainer.model.bases import WarmBases
from services.trainer.recipe.finetune import finetune
from services.trainer.recipe.free_memory import FreeMemory, free_bytes
from services.trainer.worker.lease_session import LeaseSession
from services.trainer.worker.out_of_service import (
    BASE_FAULTS,
    FIRST_SECONDS,
    BlockedBases,
    FaultCount,
    is_machine_fault,
    pause_seconds,
)
from services.trainer.worker.retry import with_retries
from shared.bases.base_model import device_answers
from shared.bases.device import device_kind
from shared.errors import JobFailed, LeaseLost, TunesmithError
from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.spec import JobFault
from shared.jobs.worker_outages import ANY_BASE, WorkerOutages
from shared.logs import get_logger
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.outages import is_away


class DeviceLost(Exception):
    """This process's device computes nothing any more; the job is given back, and the process has to end."""


class Worker:
    """One trainer on one device.

    Args:
        bases: the base model, kept warm between jobs.
        name: this worker's name in events.
        outages: where it says that it takes no jobs.
        handover: true once this worker is to release its job and claim no more.
        retry_seconds: pause after a fault; doubled with each further one of this machine.
        faults: of this machine in a row.
        check_folder: raises TunesmithError or OSError unless the artifacts folder is this installation's.
        pause: waits for so many seconds, or until the handover.
        clock: monotonic seconds.
        peak_flops: measured FLOP/s of this device's matrix products by dtype, for MFU.
        free_memory: bytes that can still be allocated on a device.
        strict_resume: fail a job that was begun on a machine that computes otherwise, instead of going on with it.
    """

    def __init__(
        self,
        leases: Leases,
        store: LocalArtifactStore,
        bases: WarmBases,
        *,
        name: str,
        outages: WorkerOutages,
        handover: Callable[[], bool],
        renew_seconds: float = 5.0,
        retry_seconds: float = FIRST_SECONDS,
        faults: FaultCount | None = None,
        check_folder: Callable[[], None] = lambda: None,
        pause: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        peak_flops: Mapping[torch.dtype, float] | None = None,
        free_memory: FreeMemory = free_bytes,
        strict_resume: bool = False,
    ) -> None:
        self._leases = leases
        self._store = store
        self._bases = bases
        self._name = name
        self._outages = outages
        self._handover = handover
        self._renew_seconds = renew_seconds
        self._retry_seconds = retry_seconds
        self._faults = faults or FaultCount()
        self._check_folder = check_folder
        self._pause = pause or self._wait
        self._blocked = BlockedBases(retry_seconds, clock)
        self._peak_flops = peak_flops or {}
        self._free_memory = free_memory
        self._strict_resume = strict_resume
        self._log = get_logger("worker")

    def drain_queue(self) -> int:
        """Claim and train queued jobs, oldest first, until none is left. Returns how many were claimed.

        Raises:
            DeviceLost: in a job; claiming the next one would only waste its attempts.
        """
        claimed = 0
        while not self._handover() and (lease := self._claim()) is not None:
            claimed += 1
            with structlog.contextvars.bound_contextvars(job_id=lease.job.id, lease_token=lease.token):
                self._log.info("claimed", attempt=lease.job.attempt)
                self._run(lease)
                if not device_answers(self._bases.device):
                    self._log.error("the device is lost; the process ends")
                    raise DeviceLost
                # A training that failed has released its tensors only now.
                self._bases.release_memory()
        return claimed

    def _claim(self) -> Lease | None:
        try:
            self._check_folder()
            device = device_kind(self._bases.device)
            return self._leases.claim(self._name, device=device, without_bases=self._blocked.names())
        except (TunesmithError, OSError) as error:
            seconds = pause_seconds(self._faults.add(), self._retry_seconds)
            self._log.error("out of service: no job is claimed", error=_told(error), seconds=seconds)
            self._report(lambda: self._outages.begin(self._name, seconds))
            self._pause(seconds)
            return None
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            # The gateway sends its notification again while jobs wait.
            self._log.warning("no job is claimed: the database does not answer", error=str(error))
            return None

    def _run(self, lease: Lease) -> None:
        try:
            self._work_on(lease)
        except LeaseLost:
            # The worker that holds the job now owns its files, too.
            self._log.warning("lease lost")
        except SQLAlchemyError as error:
            # The reaper will find that the lease has expired.
            self._log.error("how the job ended could not be written", error=str(error))
            self._pause(self._retry_seconds)

    def _work_on(self, lease: Lease) -> None:
        base = lease.job.spec.base
        try:
            self._record(lease, self._train(lease))
        except LeaseLost:
            raise
        except Exception as error:
            self._handle_fault(lease, error)
        else:
            ended = [
                of for of, was_out in ((ANY_BASE, self._faults.clear()), (base, self._blocked.clear(base))) if was_out
            ]
            if ended:
                self._report(lambda: self._outages.end(self._name, ended))

    def _handle_fault(self, lease: Lease, error: Exception) -> None:
        """Fail the job for what is its own fault, and give it back for what is this worker's; else both are suspect."""
        if isinstance(error, TunesmithError) and (isinstance(error, JobFailed) or error.status < 500):
            self._fail(lease, error)
        elif isinstance(error, TunesmithError) and error.code in BASE_FAULTS:
            self._pass_over(lease, error)
        elif is_machine_fault(error) or not device_answers(self._bases.device):
            self._go_out_of_service(lease, error)
        else:
            self._log.exception("training failed unexpectedly", exc_info=error)
            self._give_back(lambda: self._leases.requeue(lease, _told(error)))
            self._discard_base()
            self._pause(self._retry_seconds)

    def _fail(self, lease: Lease, error: TunesmithError) -> None:
        self._log.warning("job failed", code=error.code, error=error.message)
        fault = JobFault(code=error.code, message=error.message, param=error.param)
        with_retries(lambda: self._leases.fail(lease, fault), abort=self._handover)
        self._store.remove(self._store.checkpoints(lease.job.id))

    def _pass_over(self, lease: Lease, error: TunesmithError) -> None:
        """The jobs of this base wait; others are trained."""
        base = lease.job.spec.base
        seconds = self._blocked.block(base)
        self._log.error("base not available", base=base, code=error.code, error=error.message, seconds=seconds)
        reason = f"{_told(error)}; it passes over the jobs of {base} for {seconds:.0f} s"
        self._give_back(lambda: self._leases.hand_back(lease, reason))
        self._report(lambda: self._outages.begin(self._name, seconds, base))

    def _go_out_of_service(self, lease: Lease, error: Exception) -> None:
        """This machine is at fault: no job is claimed for a while, longer each time."""
        seconds = pause_seconds(self._faults.add(), self._retry_seconds)
        self._log.error("out of service", error=_told(error), seconds=seconds, exc_info=error)
        reason = f"{_told(error)}; it takes no job for {seconds:.0f} s"
        # The job first: on a lost device, everything else fails.
        self._give_back(lambda: self._leases.hand_back(lease, reason))
        self._report(lambda: self._outages.begin(self._name, seconds))
        self._discard_base()
        self._pause(seconds)

    def _give_back(self, write: Callable[[], None]) -> None:
        try:
            with_retries(write, abort=self._handover)
        except (LeaseLost, SQLAlchemyError) as error:
            # The reaper will find that the lease has expired.
            self._log.warning("could not give the job back", error=str(error))

    def _report(self, write: Callable[[], None]) -> None:
        try:
            write()
        except SQLAlchemyError as error:
            # Only watchers miss it: every outage ends by itself.
            self._log.warning("could not say whether this worker takes jobs", error=str(error))

    def _discard_base(self) -> None:
        # LoRA may be half attached.
        with suppress(RuntimeError):
            self._bases.discard()

    def _train(self, lease: Lease) -> Outcome:
        checkpoints = self._leases.checkpoints(lease)
        resume = [self._store.checkpoint(lease.job.id, c.lease_token, c.step) for c in checkpoints]
        run = JobRun(job_id=lease.job.id, lease_token=lease.token, spec=lease.job.spec)
        session = LeaseSession(self._leases, lease, handover=self._handover, renew_seconds=self._renew_seconds)
        with session:
            outcome = finetune(
                run,
                self._bases,
                self._store,
                session,
                resume,
                peak_flops=self._peak_flops,
                free_memory=self._free_memory,
                strict_resume=self._strict_resume,
            )
            session.flush()
        return outcome

    def _record(self, lease: Lease, outcome: Outcome) -> None:
        if isinstance(outcome, Finished):
            with_retries(lambda: self._leases.succeed(lease, outcome.adapter_id, outcome.report), abort=self._handover)
            ended = True
        else:
            step = outcome.step
            kept = f"the checkpoint of step {step} is kept" if step else "no new step was done"
            message = f"Stopped on worker {self._name}: {kept}"
            ended = with_retries(lambda: self._leases.release(lease, message), abort=self._handover).final
        self._log.info("job released", outcome=type(outcome).__name__)
        if ended:
            self._store.remove(self._store.checkpoints(lease.job.id))

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._handover():
            time.sleep(0.1)


def _told(error: Exception) -> str:
    """An error as an event's sentence has it."""
    return (error.message if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}")[:500]
