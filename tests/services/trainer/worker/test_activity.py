"""A process at work is told from one that only waits, by its real counters."""

import time
from pathlib import Path

import pytest

from services.trainer.worker.activity import Activity, process_counters


def test_waiting_is_no_work_and_computing_and_writing_are(tmp_path: Path) -> None:
    activity = Activity()
    time.sleep(0.3)
    activity.at_work()
    began = time.process_time()
    while time.process_time() - began < 0.2:
        sum(range(1000))
    assert activity.at_work()
    # Other threads of this process may compute; some moment is quiet.
    assert not all(_at_work_while_asleep(activity) for _ in range(20))


def _at_work_while_asleep(activity: Activity) -> bool:
    activity.at_work()
    time.sleep(0.1)
    return activity.at_work()


@pytest.mark.skipif(process_counters()[1] == 0, reason="bytes are counted on Linux")
def test_written_bytes_count(tmp_path: Path) -> None:
    before = process_counters()[1]
    (tmp_path / "weights").write_bytes(bytes(1_000_000))
    assert process_counters()[1] - before >= 1_000_000


@pytest.mark.parametrize(
    ("cpu", "moved", "work"), [(0.0, 0, False), (0.4, 400_000, False), (0.6, 0, True), (0.0, 600_000, True)]
)
def test_rates_over_the_time_since_the_last_question(cpu: float, moved: int, work: bool) -> None:
    now, counters = 0.0, (7.0, 70)
    activity = Activity(lambda: counters, lambda: now)
    now, counters = 5.0, (7.0 + cpu, 70 + moved)
    assert activity.at_work() is work
    now = 10.0
    assert not activity.at_work()
