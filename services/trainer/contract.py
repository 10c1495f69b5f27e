"""The recipe's contract: its input, the session it reports to, and how it ends.

Owns no behaviour. The worker implements `Session`; nothing here knows how a job is stored or queued.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from shared.jobs.spec import JobSpec, Phase, Progress, TrainingReport
from shared.storage.manifests import Manifest

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


@dataclass(frozen=True, slots=True)
class JobRun:
    """One claim on one job. `lease_token` only names the folder of resume states; no trained byte depends on it."""

    job_id: str
    lease_token: int
    spec: JobSpec


class Session(Protocol):
    """The recipe's only way to the outside. Every method may raise `LeaseLost`, which ends the run at once."""

    def phase(self, phase: Phase) -> None: ...

    def progress(self, progress: Progress) -> None:
        """After every optimizer step."""
        ...

    def event(
        self, message: str, *, level: Level = "info", type: EventType = "message", data: dict[str, Any] | None = None
    ) -> None: ...

    def first_step(self, *, base_loaded: bool) -> None:
        """The first optimizer step of this claim is done; `base_loaded` is False if the base was warm."""
        ...

    def should_stop(self) -> bool:
        """Whether to checkpoint and release the job (pause, cancel, shutdown). Cheap: asked between micro-batches."""
        ...

    def reserve_adapter(self) -> str:
        """A fresh adapter id, recorded as this claim's before anything is written under it."""
        ...

    def commit_checkpoint(self, *, step: int, adapter_id: str, metrics: dict[str, float]) -> Sequence[str]:
        """Make a published checkpoint and its servable adapter known, in one transaction.

        The resume state lies at `store.checkpoint(job_id, lease_token, step)`.

        Args:
            metrics: `train_loss` (mean since the last metrics event) and, with a validation file, `valid_loss`.

        Returns:
            Ids of the checkpoints' adapters that need not stay, and that nobody knows any more.
        """
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """The final adapter is published and checked; making it known, with the report, is the caller's transaction."""

    adapter_id: str
    adapter: Manifest
    report: TrainingReport


@dataclass(frozen=True, slots=True)
class Stopped:
    """Stopped on request after whole step `step`, whose checkpoint is committed.

    `step` is 0 if this claim has neither done a step nor restored one; earlier checkpoints stay.
    """

    step: int


Outcome = Finished | Stopped


class StopRequested(Exception):
    """A `Check` raises it inside the recipe; it never leaves the recipe."""


Check = Callable[[], None]
"""Asks the session whether to go on; raises `StopRequested` or `LeaseLost` if not."""


def stop_check(session: Session) -> Check:
    def check() -> None:
        if session.should_stop():
            raise StopRequested

    return check
