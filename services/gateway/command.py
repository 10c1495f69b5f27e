"""How the gateway's commands for operators end: with a sentence on stderr and a status, never with a traceback."""

import sys
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from shared.errors import TunesmithError


def status_of(work: Callable[[], None]) -> int:
    """The exit status of a command: 0, or 1 if the work was refused or the disk or the database failed it."""
    try:
        work()
    except TunesmithError as error:
        print(error.message, file=sys.stderr)
        return 1
    except (OSError, SQLAlchemyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
