"""What a worker does not take for now: any job, after faults of its machine; or the jobs of a base it cannot have.

Owns how long, and which errors are the machine's. Knows no job store.
"""

import errno
import mmap
import time
from collections.abc import Callable

from safetensors import SafetensorError
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import ArtifactCorrupt, JobFailed, TunesmithError
from shared.storage.outages import is_away

FIRST_SECONDS = 10.0
MOST_SECONDS = 300.0
# The base cannot be had here, or now; jobs on others can be trained.
BASE_FAULTS = frozenset(
    {"base_unavailable", "hub_unreachable", "model_gated", "model_missing", "revision_missing", ArtifactCorrupt.code}
)
_MOST_COUNTED = 255


def pause_seconds(faults: int, first: float) -> float:
    """`first`, doubled with each further fault in a row, to five minutes at most."""
    return min(first * 2.0 ** (max(faults, 1) - 1), MOST_SECONDS)


def is_machine_fault(error: Exception) -> bool:
    """Whether what a job met is the machine's fault or that of what it depends on: no job must end for it.

    Memory is not: a job that needs too much of it would go round for ever.
    """
    if isinstance(error, TunesmithError):
        return error.status >= 500 and not isinstance(error, JobFailed)
    cause: BaseException | None = error
    while cause is not None:
        # transformers raises OSError without a number for a model that it does not understand.
        if isinstance(cause, OSError) and cause.errno not in (None, errno.ENOMEM):
            return True
        if isinstance(cause, SafetensorError) and "os error" in str(cause):
            return True
        if isinstance(cause, SQLAlchemyError) and is_away(cause):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


class FaultCount:
    """The faults of this machine in a row.

    Args:
        memory: one byte, which a process may share with its replacement: a fresh process is no healed machine.
    """

    def __init__(self, memory: bytearray | mmap.mmap | None = None) -> None:
        self._memory = bytearray(1) if memory is None else memory

    def add(self) -> int:
        """Count one more. Returns how many there are."""
        self._memory[0] = min(self._memory[0] + 1, _MOST_COUNTED)
        return self._memory[0]

    def clear(self) -> bool:
        """Count from 0 again. Returns whether there were any."""
        any_counted = self._memory[0] > 0
        self._memory[0] = 0
        return any_counted


class BlockedBases:
    """The bases that this worker cannot have for now.

    Args:
        first: seconds after the first fault.
        clock: monotonic seconds.
    """

    def __init__(self, first: float = FIRST_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first
        self._clock = clock
        self._faults: dict[str, int] = {}
        self._until: dict[str, float] = {}

    def block(self, base: str) -> float:
        """Pass over the jobs of a base. Returns for how many seconds."""
        self._faults[base] = min(self._faults.get(base, 0) + 1, _MOST_COUNTED)
        seconds = pause_seconds(self._faults[base], self._first)
        self._until[base] = self._clock() + seconds
        return seconds

    def clear(self, base: str) -> bool:
        """The base could be had. Returns whether it was blocked since it could be had last."""
        self._until.pop(base, None)
        return self._faults.pop(base, None) is not None

    def names(self) -> list[str]:
        """The bases whose jobs are passed over now."""
        now = self._clock()
        return sorted(base for base, until in self._until.items() if until > now)
