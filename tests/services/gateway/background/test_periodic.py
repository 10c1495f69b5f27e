import threading

import pytest

from services.gateway.background.notifier import Notifier
from services.gateway.background.periodic import Periodic


def test_it_works_again_and_again_though_it_fails() -> None:
    called = threading.Semaphore(0)

    def fail() -> None:
        called.release()
        raise OSError("away")

    periodic = Periodic("test", fail, 0.001)
    periodic.start()
    assert all(called.acquire(timeout=120) for _ in range(3))
    periodic.stop()
    assert not periodic._thread.is_alive()


def test_waking_calls_at_once_and_stopping_waits() -> None:
    called, go_on = threading.Event(), threading.Event()

    def work() -> None:
        called.set()
        assert go_on.wait(120)

    periodic = Periodic("test", work, 3600)
    periodic.start()
    assert not called.is_set()
    periodic.wake()
    assert called.wait(120)
    stopping = threading.Thread(target=periodic.stop)
    stopping.start()
    stopping.join(0.05)
    assert stopping.is_alive()
    go_on.set()
    stopping.join(120)
    assert not stopping.is_alive()


def test_stopping_what_never_started_is_harmless() -> None:
    Periodic("test", lambda: None, 1).stop()


class Queue:
    """A notification queue that fails while `away`."""

    def __init__(self) -> None:
        self.away = False
        self.tries = 0
        self.tried = threading.Semaphore(0)

    def notify(self) -> bool:
        self.tries += 1
        self.tried.release()
        return not self.away


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_one_notification_per_call(queue: Queue) -> None:
    notifier = Notifier(queue, lambda: 0)  # type: ignore[arg-type]
    notifier.start()
    for _ in range(3):
        notifier.notify()
    assert all(queue.tried.acquire(timeout=120) for _ in range(3))
    notifier.stop()
    assert queue.tries == 3


def test_what_is_wanted_at_the_end_is_still_sent(queue: Queue) -> None:
    notifier = Notifier(queue, lambda: 0)  # type: ignore[arg-type]
    notifier.notify()
    notifier.stop()
    assert queue.tries == 1


def test_while_redis_is_away_the_piled_up_ones_are_dropped(queue: Queue) -> None:
    notifier = Notifier(queue, lambda: 0)  # type: ignore[arg-type]
    queue.away = True
    for _ in range(50):
        notifier.notify()
    notifier.stop()
    assert queue.tries == 1
