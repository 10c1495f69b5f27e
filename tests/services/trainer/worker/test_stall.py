"""What counts as a hang; the clock is the test's own."""

from services.trainer.worker.stall import STALL_SECONDS, STALL_STEPS, StallDetector


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_moves_is_not_stalled() -> None:
    clock = Clock()
    stall = StallDetector(clock)
    clock.now += STALL_SECONDS
    assert not stall.stalled()
    clock.now += 1
    assert stall.stalled()
    stall.moved()
    assert not stall.stalled()
    clock.now += STALL_SECONDS + 1
    stall.step_done()
    assert not stall.stalled()


def test_slow_steps_are_not_taken_for_a_hang() -> None:
    clock = Clock()
    stall = StallDetector(clock)
    for _ in range(3):
        clock.now += 300
        stall.step_done()
    clock.now += STALL_STEPS * 300
    assert not stall.stalled()
    clock.now += 1
    assert stall.stalled()
