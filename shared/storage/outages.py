"""Which failures of a database call say that the database is away: worth waiting for, and nobody's fault.

Owns the classification alone; who waits, and for how long, is the caller's.
"""

import sqlite3

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted

# SQLSTATE, whole or by its class (PostgreSQL's manual, appendix A).
_AWAY_CLASSES = (
    "08",  # connection exceptions
    "53",  # insufficient resources: disk full, out of memory, too many connections
    "57P",  # shutting down, crashed, starting up, dropped
    "58",  # system errors, such as an I/O error under the database
)
_AWAY_STATES = {
    "25006",  # read-only: a standby after a failover, or a server told to refuse writes
    "25P03",  # ended because the transaction stood idle for too long
    "40001",  # serialisation failure
    "40P01",  # deadlock
    "55P03",  # a lock was not available in time
    "57014",  # the statement took too long
}
_SQLITE_AWAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
}


def is_full(error: BaseException) -> bool:
    """Whether the database refused to write since its disk is full."""
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return getattr(error.orig, "sqlstate", None) == "53100"


def is_away(error: BaseException) -> bool:
    """Whether the same call may succeed later without anybody changing it.

    False for what the database objects to: a constraint, a type, a statement it cannot carry out.
    """
    if isinstance(error, PoolExhausted):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", None)
        # Extended codes keep the primary one in their lowest byte.
        return code is not None and code & 0xFF in _SQLITE_AWAY
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        # Without a state there was no answer: refused, timed out, or cut in the middle.
        return isinstance(error, OperationalError | InterfaceError)
    return state in _AWAY_STATES or state.startswith(_AWAY_CLASSES)
