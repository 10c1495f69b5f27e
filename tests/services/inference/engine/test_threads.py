"""The number of threads follows what is faster, and soon, whatever others do to the cores."""

from collections.abc import Callable

import pytest

from services.inference.engine.threads import LONGEST_RETRY_SECONDS, StepThreads


class Cores:
    """Two cores and a clock: a step takes what `seconds` says for the number of threads that is set."""

    def __init__(self) -> None:
        self.now, self.threads = 0.0, 2
        self.choice = StepThreads(2, clock=lambda: self.now, set_threads=self._set)

    def _set(self, threads: int) -> None:
        self.threads = threads

    def steps(self, count: int, seconds: Callable[[int], float], kind: str = "decode", size: int = 1) -> list[int]:
        """Run steps; returns the threads of each."""
        used = []
        for _ in range(count):
            with self.choice.step(kind, size):
                used.append(self.threads)
                self.now += seconds(self.threads)
            assert self.threads == 2
        return used


def quiet(threads: int) -> float:
    return 0.010 if threads == 2 else 0.012


def shared(threads: int) -> float:
    return 0.090 if threads == 2 else 0.013


def test_idle_cores_are_all_used_but_for_rare_trials() -> None:
    used = Cores().steps(2000, quiet)
    assert used[:6] == [2, 2, 2, 1, 1, 1]
    assert used[6:].count(1) <= 6


def test_shared_cores_cost_a_few_slow_steps_and_then_one_for_each_trial() -> None:
    cores = Cores()
    cores.steps(100, quiet)
    used = cores.steps(4000, shared)
    assert used[:4].count(2) >= 2
    assert used[10:].count(2) <= 7
    assert 1 in cores.steps(10, shared)


def test_cores_that_become_free_are_found_again() -> None:
    cores = Cores()
    cores.steps(20, quiet), cores.steps(2000, shared)
    used = cores.steps(int(LONGEST_RETRY_SECONDS / 0.010) + 10, quiet)
    assert used[-5:] == [2] * 5


def test_kinds_and_sizes_learn_apart() -> None:
    cores = Cores()
    cores.steps(50, shared, "decode", 1)
    assert cores.steps(4, quiet, "decode", 8) == [2, 2, 2, 1]
    assert cores.steps(4, quiet, "prefill", 1) == [2, 2, 2, 1]
    assert cores.steps(1, shared, "decode", 1) == [1]


def test_a_step_that_fails_is_not_counted_and_leaves_all_threads() -> None:
    cores = Cores()
    with pytest.raises(RuntimeError), cores.choice.step("decode", 1):
        raise RuntimeError
    assert cores.threads == 2
    assert cores.steps(4, quiet) == [2, 2, 2, 1]


def test_one_thread_is_left_alone() -> None:
    def never(_: int) -> None:
        raise AssertionError

    with StepThreads(1, set_threads=never).step("decode", 1):
        pass
