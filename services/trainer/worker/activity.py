"""Whether this process is at work, told from its counters: a download or a base's conversion reports no steps."""

import time
from collections.abc import Callable
from pathlib import Path

# More than a process has that only renews its lease.
CPU_SHARE = 0.1
BYTES_PER_SECOND = 100_000
_COUNTERS = Path("/proc/self/io")


def process_counters() -> tuple[float, int]:
    """(CPU seconds, bytes read and written through files) of this process; 0 bytes where Linux is not."""
    try:
        lines = _COUNTERS.read_text().splitlines()
    except OSError:
        return time.process_time(), 0
    return time.process_time(), sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))


class Activity:
    """Asked again and again.

    Args:
        counters: (CPU seconds, bytes) so far.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        counters: Callable[[], tuple[float, int]] = process_counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = counters
        self._clock = clock
        self._before = (clock(), *counters())

    def at_work(self) -> bool:
        """Whether the process has computed, read or written since the last question as no idle one does."""
        then, cpu_then, bytes_then = self._before
        now = self._clock()
        cpu, moved = self._counters()
        self._before = (now, cpu, moved)
        seconds = now - then
        return cpu - cpu_then > CPU_SHARE * seconds or moved - bytes_then > BYTES_PER_SECOND * seconds
