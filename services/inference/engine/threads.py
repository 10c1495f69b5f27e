"""How many threads a forward pass runs on: all of them while the cores are the engine's own, one while it shares them.

A step has hundreds of short parallel regions, each over when its last thread is. On idle cores several threads are
faster; where another process wants a core, every region waits for the scheduler, and a step takes ten times as long.
One thread waits for nobody. Nothing says beforehand which it will be, so both are timed. Knows no model.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

FIRST_PATIENCE, MOST_PATIENCE = 1.0, 60.0
"""Seconds until the other number of threads is tried again; doubled each time that it was slower."""
_TIMES = 3


class _Pace:
    """Steps of one kind and size: the last times of each number of threads, and the one in use."""

    def __init__(self, threads: int) -> None:
        self.seconds: dict[int, deque[float]] = {threads: deque(maxlen=_TIMES), 1: deque(maxlen=_TIMES)}
        self.used, self.other = threads, 1
        self.patience, self.try_at = FIRST_PATIENCE, 0.0

    def choose(self, now: float) -> int:
        """The number of threads for the next step."""
        for threads, seconds in self.seconds.items():
            if len(seconds) < _TIMES:
                return threads
        if median(self.seconds[self.other]) < median(self.seconds[self.used]):
            self.used, self.other = self.other, self.used
            self.patience, self.try_at = FIRST_PATIENCE, now + FIRST_PATIENCE
        return self.used if now < self.try_at else self.other

    def note(self, threads: int, seconds: float, now: float) -> None:
        """What the step took; a trial that is slower is the last for a while."""
        if threads == self.other and self.seconds[self.used] and seconds >= median(self.seconds[self.used]):
            self.try_at = now + self.patience
            self.patience = min(2 * self.patience, MOST_PATIENCE)
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
        self._paces: dict[tuple[str, int], _Pace] = {}

    @contextmanager
    def step(self, kind: str, size: int) -> Iterator[None]:
        """Time a step of so many rows or tokens; sizes of one power of two learn together."""
        if self._available == 1:
            yield
            return
        pace, started = self._paces.setdefault((kind, size.bit_length()), _Pace(self._available)), self._clock()
        threads = pace.choose(started)
        self._set(threads)
        try:
            yield
        finally:
            self._set(self._available)
        ended = self._clock()
        pace.note(threads, ended - started, ended)
