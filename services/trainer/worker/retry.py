"""Writes that must not be lost because the database restarts."""

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError

from shared.logs import get_logger

PATIENCE_SECONDS = 300.0
RETRY_SECONDS = 1.0

T = TypeVar("T")


def with_retries(write: Callable[[], T], *, abort: Callable[[], bool] = lambda: False) -> T:
    """The result of `write`, repeated while the database is away; hours of training are worth minutes of waiting.

    A commit whose answer was lost is made twice, so `write` must be one that may be.

    Args:
        abort: true when there is no time to wait (shutdown).

    Raises:
        SQLAlchemyError: the database was away for too long, or objects.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return write()
        except (OperationalError, InterfaceError) as error:
            if abort() or time.monotonic() > deadline:
                raise
            get_logger("patience").warning("the database does not answer; trying again", error=str(error))
        time.sleep(RETRY_SECONDS)
