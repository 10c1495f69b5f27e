"""The clock that rows are dated by; tests pass one of their own."""

from collections.abc import Callable

Nanoseconds = Callable[[], int]
"""A clock: nanoseconds since the epoch."""


def seconds_of(now_ns: int) -> int:
    """Whole seconds of a moment in nanoseconds, as rows keep them."""
    return now_ns // 1_000_000_000
