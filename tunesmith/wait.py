"""Waiting for a job to end, through restarts of the gateway. Knows no terminal: it reports to a watcher."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from tunesmith.client import ApiError

Json = dict[str, Any]
RETRY_SECONDS = 300.0


class Exit(IntEnum):
    """How `tunesmith wait` ends; scripts rely on these numbers."""

    SUCCEEDED = 0
    COULD_NOT_TELL = 1
    USAGE = 2
    TIMEOUT = 3
    DENIED = 4
    FAILED = 5
    CANCELLED = 6
    INTERRUPTED = 130


# By the final states of OpenAI's vocabulary.
END = {"succeeded": Exit.SUCCEEDED, "failed": Exit.FAILED, "cancelled": Exit.CANCELLED}


class Watcher(Protocol):
    """Shows a job's progress, and notes about the connection."""

    def saw(self, job: Json) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Ending:
    """How the waiting ended.

    Attributes:
        job: as last seen; None if it never was.
    """

    exit: Exit
    job: Json | None
    message: str


def wait_for_job(
    fetch: Callable[[], Json],
    watcher: Watcher,
    *,
    timeout: float | None = None,
    interval: float = 1.0,
    retry_seconds: float = RETRY_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Ending:
    """Poll until the job has ended.

    Args:
        fetch: gets the job; raises ApiError.
        timeout: seconds after which to stop waiting (the job goes on); None for never.
        interval: seconds between two requests.
        retry_seconds: how long to retry without a usable answer before the job's end counts as unknown.
        clock: monotonic seconds.
    """
    started = answered = clock()
    job: Json | None = None
    lost = False
    while True:
        pause = interval
        try:
            job = fetch()
        except ApiError as error:
            if error.denied:
                return Ending(Exit.DENIED, job, error.message)
            if not error.passing or clock() - answered >= retry_seconds:
                return Ending(Exit.COULD_NOT_TELL, job, f"could not tell what became of the job: {error.message}")
            if not lost:
                watcher.note(f"{error.message}; trying again for {retry_seconds:.0f} s")
            lost = True
            pause = max(interval, error.retry_after or 0)
        else:
            answered = clock()
            if lost:
                watcher.note("connected again")
            lost = False
            watcher.saw(job)
            if (end := END.get(job["status"])) is not None:
                return Ending(end, job, describe_end(job))
        if timeout is not None and clock() - started + pause > timeout:
            return Ending(Exit.TIMEOUT, job, f"not finished after {timeout:g} s; the job goes on")
        sleep(pause)


def describe_end(job: Json) -> str:
    """One sentence about a job that has ended."""
    if job["status"] == "succeeded":
        return f"succeeded: {job.get('fine_tuned_model')}"
    error = job.get("error") or {}
    reason = f": {error['message']}" if error.get("message") else ""
    return f"{job['status']}{reason}"
