"""How many threads a forward pass runs on: all while the cores are idle, one while other processes use them too.

A step has hundreds of short parallel regions, and each ends with its last thread. On idle cores several threads are
faster; where another process wants a core, every region waits for the operating system, and a step takes ten times as
long. One thread waits for no other. Which is faster cannot be known beforehand, so both are timed. Knows no model.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 60.0
"""Time until the other number of threads is tried again; doubled each time that it was slower."""
_TIMES = 3


class _StepTimes:
    """Steps of one kind and size: the last times with each number of threads, and the number in use."""

    def __init__(self, threads: int) -> None:
        self.seconds: dict[int, deque[float]] = {threads: deque(maxlen=_TIMES), 1: deque(maxlen=_TIMES)}
        self.used, self.other = threads, 1
        self.retry_seconds, self.retry_at = FIRST_RETRY_SECONDS, 0.0

    def choose(self, now: float) -> int:
        """The number of threads for the next step."""
        for threads, seconds in self.seconds.items():
            if len(seconds) < _TIMES:
                return threads
        if median(self.seconds[self.other]) < median(self.seconds[self.used]):
            self.used, self.other = self.other, self.used
            self.retry_seconds, self.retry_at = FIRST_RETRY_SECONDS, now + FIRST_RETRY_SECONDS
        return self.used if now < self.retry_at else self.other

    def record(self, threads: int, seconds: float, now: float) -> None:
        """Record what a step took; a slower trial postpones the next one."""
        if threads == self.other and self.seconds[self.used] and seconds >= median(self.seconds[self.used]):
            self.retry_at = now + self.retry_seconds
            self.retry_seconds = min(2 * self.retry_seconds, LONGEST_RETRY_SECONDS)
        self.seconds[threads].append(seconds)


class StepThreads:
    """Chooses the number of threads of each step; used from the engine's thread only.

    Args:
        available: torch's threads; with one there is nothing to choose.
        clock: seconds.
    """

    def __init__(
        self,
        available: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        set_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self._available, self._clock, self._set = available, clock, set_threads
        self._times: dict[tuple[str, int], _StepTimes] = {}

    @contextmanager
    def step(self, kind: str, size: int) -> Iterator[None]:
        """Time a step of so many rows or tokens; sizes of one power of two share their times."""
        if self._available == 1:
            yield
            return
        times = self._times.setdefault((kind, size.bit_length()), _StepTimes(self._available))
        started = self._clock()
        threads = times.choose(started)
        self._set(threads)
        try:
            yield
        finally:
            self._set(self._available)
        ended = self._clock()
        times.record(threads, ended - started, ended)
