"""A job's events live, through restarts of the gateway: each one once, in order. Knows no terminal and no HTTP."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from tunesmith.client import ApiError
from tunesmith.wait import RETRY_SECONDS

Json = dict[str, Any]


def follow(
    connect: Callable[[str | None], AbstractContextManager[Iterator[Json]]],
    note: Callable[[str], None],
    *,
    pause: float = 1.0,
    retry_seconds: float = RETRY_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Json]:
    """Every event until the job has ended.

    Args:
        connect: opens the stream of what comes after the event of an id (None: from the first on); raises ApiError,
            when it is opened or while it is read.
        note: called with a line when the connection is lost and when it is back.
        pause: seconds between two attempts.
        retry_seconds: how long to retry without a connection before the error is raised.
        clock: monotonic seconds.

    Raises:
        ApiError: the gateway refused the request, or was away for too long.
    """
    seen: str | None = None
    lost_at: float | None = None
    while True:
        try:
            with connect(seen) as events:
                if lost_at is not None:
                    note("connected again")
                lost_at = None
                for event in events:
                    seen = event["id"]
                    yield event
            return
        except ApiError as error:
            if not error.passing or (lost_at is not None and clock() - lost_at >= retry_seconds):
                raise
            if lost_at is None:
                note(f"{error.message}; trying again for {retry_seconds:.0f} s")
                lost_at = clock()
            sleep(max(pause, error.retry_after or 0))
