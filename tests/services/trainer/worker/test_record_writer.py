"""What a training says of itself, written on a thread of its own into a real SQLite file."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from services.trainer.worker import record_writer
from services.trainer.worker.record_writer import RecordWriter
from shared.errors import LeaseLost
from shared.jobs.fencing import Lease
from shared.jobs.heartbeats import Heartbeats
from shared.jobs.leases import Leases
from shared.jobs.rows import NewEvent
from shared.jobs.spec import Progress
from shared.storage.database import Database
from tests.jobs import Jobs


class Scripted(Leases):
    """The real thing, whose `record` fails as told: before its transaction, or after it (the answer was lost)."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.failures: list[tuple[str, Exception]] = []
        self.calls = 0
        self.open = threading.Event()
        self.open.set()

    def record(self, *args: Any, **options: Any) -> None:
        self.open.wait()
        self.calls += 1
        when, error = self.failures.pop(0) if self.failures else ("", None)
        if when != "before":
            super().record(*args, **options)
        if error is not None:
            raise error


def away() -> OperationalError:
    return OperationalError("UPDATE", None, Exception("server closed the connection unexpectedly"))


@pytest.fixture
def leases(database: Database) -> Scripted:
    return Scripted(database)


@pytest.fixture
def writer(leases: Scripted, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordWriter]:
    monkeypatch.setattr(record_writer, "RETRY_EVERY_SECONDS", 0.01)
    writer = RecordWriter(leases, lease)
    writer.start()
    yield writer
    leases.open.set()
    writer.stop(within=10)


def flush(writer: RecordWriter, abort: Callable[[], bool] = lambda: False, within: float = 60) -> None:
    writer.flush(abort=abort, within=within)


def messages(store: Jobs, lease: Lease) -> list[str]:
    found = store.events("default", lease.job.id, limit=100).items
    assert [event.number for event in found] == list(range(len(found), 0, -1))
    return [event.message for event in reversed(found) if event.message.isdigit()]


def test_an_answer_that_was_lost_doubles_nothing(
    store: Jobs, leases: Scripted, lease: Lease, writer: RecordWriter
) -> None:
    leases.failures = [("after", away()), ("before", away()), ("after", away())]
    for number in range(20):
        writer.put(NewEvent(str(number)))
    flush(writer)
    assert messages(store, lease) == [str(number) for number in range(20)]


def test_the_next_lease_counts_anew(store: Jobs, leases: Scripted, lease: Lease, writer: RecordWriter) -> None:
    for number in range(3):
        writer.put(NewEvent(str(number)))
        flush(writer)
    leases.release(lease, "stopped")
    again = leases.claim("v")
    assert again is not None
    other = RecordWriter(leases, again)
    other.start()
    other.put(NewEvent("3"))
    other.stop(within=60)
    assert messages(store, lease) == ["0", "1", "2", "3"]


def test_progress_is_thinned(store: Jobs, leases: Scripted, lease: Lease, writer: RecordWriter) -> None:
    for step in range(1, 200):
        writer.put(progress=Progress(step=step))
    flush(writer)
    assert store.get("default", lease.job.id).progress.step == 199
    assert leases.calls <= 3


def test_an_event_keeps_the_time_it_was_put_at(
    store: Jobs, leases: Scripted, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RecordWriter(leases, lease, now=lambda: 1_000_000_000_000)
    writer.start()
    writer.put(NewEvent("early"))
    writer.stop(within=60)
    assert store.events("default", lease.job.id, limit=1).items[0].created_at == 1000


def test_a_lost_lease_is_told(leases: Scripted, lease: Lease, writer: RecordWriter, database: Database) -> None:
    heartbeats = Heartbeats(database)
    assert heartbeats.expire(heartbeats.read()[0])
    writer.put(NewEvent("late"))
    with pytest.raises(LeaseLost):
        flush(writer)
    assert writer.lost
    writer.put(NewEvent("later"))
    with pytest.raises(LeaseLost):
        flush(writer)


def test_what_the_database_objects_to_is_raised(leases: Scripted, writer: RecordWriter) -> None:
    leases.failures = [("before", IntegrityError("INSERT", None, Exception("no")))]
    writer.put(NewEvent("wrong"))
    with pytest.raises(IntegrityError):
        flush(writer)
    assert not writer.lost


@pytest.mark.parametrize("limit", ["shutdown", "time"])
def test_waiting_ends(leases: Scripted, writer: RecordWriter, limit: str) -> None:
    leases.failures = [("before", away())] * 10_000
    writer.put(NewEvent("waits"))
    with pytest.raises(OperationalError):
        flush(writer, abort=lambda: limit == "shutdown", within=60 if limit == "shutdown" else 0.05)
    writer.stop(within=0.05)


def test_a_write_that_hangs_holds_up_nobody_and_metrics_are_bounded(
    store: Jobs, leases: Scripted, lease: Lease, writer: RecordWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_writer, "MAX_WAITING_EVENTS", 5)
    leases.open.clear()
    writer.put(NewEvent("0"))
    deadline = time.monotonic() + 60
    while writer._waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.put(NewEvent("1"))
    for step in range(10):
        writer.put(NewEvent(f"step {step}", type="metrics", data={"step": step}))
    leases.open.set()
    flush(writer)
    found = [event.message for event in reversed(store.events("default", lease.job.id, limit=100).items)]
    assert found[-6:] == ["0", "1", "step 6", "step 7", "step 8", "step 9"]
