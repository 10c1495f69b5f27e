"""Whether a training hangs: a worker that does must lose its job, although its process lives."""

import statistics
from collections import deque
from collections.abc import Callable

STALL_SECONDS = 600.0
STALL_STEPS = 10
REMEMBERED_STEPS = 101


class StallDetector:
    """Nothing has moved (no micro-batch, step or phase) for max(10 min, 10 x the median step).

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._moved = self._stepped = clock()
        self._steps: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    def moved(self) -> None:
        """Count a sign of progress that is no whole step."""
        self._moved = self._clock()

    def step_done(self) -> None:
        """Count an optimizer step."""
        now = self._clock()
        self._steps.append(now - self._stepped)
        self._moved = self._stepped = now

    def stalled(self) -> bool:
        """Whether the training hangs."""
        limit = STALL_SECONDS
        if self._steps:
            limit = max(limit, STALL_STEPS * statistics.median(self._steps))
        return self._clock() - self._moved > limit
