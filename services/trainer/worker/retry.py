"""Writes that are retried while the database is away, for example while it restarts."""

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from shared.logs import get_logger
from shared.storage.outages import is_away

RETRY_FOR_SECONDS = 3600.0
RETRY_EVERY_SECONDS = 1.0

T = TypeVar("T")


def with_retries(write: Callable[[], T], *, abort: Callable[[], bool] = lambda: False) -> T:
    """The result of `write`, retried while the database is away; hours of training are worth an hour of waiting.

    `write` must be idempotent: it runs twice if the answer to its commit was lost.

    Args:
        abort: asked after each try; true when there is no time to wait (shutdown).

    Raises:
        SQLAlchemyError: the database was away for too long, or objects.
    """
    deadline = time.monotonic() + RETRY_FOR_SECONDS
    while True:
        try:
            return write()
        except SQLAlchemyError as error:
            if not is_away(error) or abort() or time.monotonic() > deadline:
                raise
            get_logger("retry").warning("the database does not answer; retrying", error=str(error))
        time.sleep(RETRY_EVERY_SECONDS)
