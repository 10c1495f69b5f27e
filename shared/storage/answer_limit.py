"""PostgreSQL connections that are given up when the server says nothing for too long.

The server's own limits end what it works on, and TCP's end a connection to a machine that is gone. Neither notices a
server that stands still (stopped, on a disk that hangs, behind a proxy that lost it): its machine still acknowledges.
Knows no SQL.
"""

import time
from collections.abc import Generator
from typing import Any, TypeVar

from psycopg import Connection, OperationalError
from psycopg.abc import PQGen

T = TypeVar("T")
WAKE_SECONDS = 0.1


def limited_connection(seconds: float) -> type[Connection[Any]]:
    """A class of connections that wait for each answer for so many seconds.

    Beyond that they close themselves and raise psycopg's OperationalError.
    """

    class LimitedConnection(Connection[Any]):
        def wait(self, gen: PQGen[T], interval: float = WAKE_SECONDS, *args: Any, **options: Any) -> T:
            try:
                return super().wait(_limited(gen, seconds), interval, *args, **options)
            except _Silent:
                # What it was asked is still under way: it can be used for nothing else.
                self.pgconn.finish()
                raise OperationalError(f"the server has not answered for {seconds:g} s") from None

    return LimitedConnection


class _Silent(Exception):
    pass


def _limited(gen: PQGen[T], seconds: float) -> Generator[Any, Any, T]:
    """As `gen`, which is resumed with what the socket is ready for: with nothing, now and then, while it is silent."""
    until = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready:
                until = time.monotonic() + seconds
            elif time.monotonic() > until:
                raise _Silent
            wanted = gen.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result
