"""A lease's session against a real SQLite store; the clock is the test's own."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from services.trainer.worker.lease_session import LeaseSession
from services.trainer.worker.stall import STALL_SECONDS
from shared.errors import LeaseLost
from shared.jobs.fencing import Lease
from shared.jobs.heartbeats import Heartbeats
from shared.jobs.leases import Leases
from shared.jobs.spec import Phase, Progress, State
from shared.storage.database import Database
from tests.jobs import Jobs


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Renewals(Leases):
    """The real thing, which also tells when it was asked to renew."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.heartbeats = Heartbeats(database)
        self.renewed = threading.Semaphore(0)

    def renew(self, lease: Lease):  # type: ignore[no-untyped-def]
        try:
            return super().renew(lease)
        finally:
            self.renewed.release()


@pytest.fixture
def leases(database: Database) -> Renewals:
    return Renewals(database)


def session(
    leases: Leases, lease: Lease, clock: Callable[[], float], *, handover: bool = False, renew: float = 0.01
) -> LeaseSession:
    return LeaseSession(
        leases,
        lease,
        handover=lambda: handover,
        renew_seconds=renew,
        clock=clock,
        at_work=lambda: False,
        on_hang=lambda: None,
    )


def wait_for(leases: Renewals, times: int) -> None:
    for _ in range(times):
        assert leases.renewed.acquire(timeout=120)


def wait_until_not_renewing(open_session: LeaseSession) -> None:
    deadline = time.monotonic() + 120
    while open_session.renewing:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_lease_is_renewed_beside_the_work(leases: Renewals, lease: Lease) -> None:
    with session(leases, lease, Clock()):
        wait_for(leases, 3)
    assert leases.heartbeats.read()[0].renewals >= 3


@pytest.mark.parametrize("action", ["pause", "cancel"])
def test_a_requested_action_is_seen(store: Jobs, leases: Renewals, lease: Lease, action: str) -> None:
    with session(leases, lease, Clock()) as open_session:
        assert not open_session.should_stop()
        getattr(store, action)("default", lease.job.id)
        wait_for(leases, 2)
        assert open_session.should_stop()


def test_shutdown_is_seen_without_asking_the_database(leases: Renewals, lease: Lease) -> None:
    assert session(leases, lease, Clock(), handover=True).should_stop()


def test_a_lost_lease_raises(leases: Renewals, lease: Lease) -> None:
    with session(leases, lease, Clock()) as open_session:
        wait_for(leases, 1)
        while not leases.heartbeats.expire(leases.heartbeats.read()[0]):
            pass
        leases.renewed.acquire(timeout=120)
        wait_until_not_renewing(open_session)
        with pytest.raises(LeaseLost):
            open_session.should_stop()


def test_a_training_that_hangs_is_given_back_and_its_process_ends(store: Jobs, leases: Renewals, lease: Lease) -> None:
    clock, ended = Clock(), threading.Event()
    hanging = LeaseSession(
        leases, lease, handover=lambda: False, renew_seconds=0.01, clock=clock, at_work=bool, on_hang=ended.set
    )
    with hanging:
        wait_for(leases, 1)
        clock.now += STALL_SECONDS + 1
        assert ended.wait(60)
        wait_until_not_renewing(hanging)
        # If it wakes up all the same, it must stop at once.
        with pytest.raises(LeaseLost):
            hanging.should_stop()
    job = store.get("default", lease.job.id)
    assert (job.state, job.worker_failures) == (State.QUEUED, 1)
    assert any("hung" in event.message for event in store.events("default", lease.job.id).items)


def test_a_hanging_process_says_where_and_dies() -> None:
    script = """
import threading
from services.trainer.worker.hang import end_hanging_process
def waiting_for_ever(): threading.Event().wait()
threading.Thread(target=waiting_for_ever, daemon=True).start()
end_hanging_process()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[4],
    )
    assert ended.returncode == -signal.SIGKILL
    assert "waiting_for_ever" in ended.stderr


def test_a_base_on_its_way_is_no_hang_but_training_without_a_step_is(leases: Renewals, lease: Lease) -> None:
    clock, ended = Clock(), threading.Event()
    downloading = LeaseSession(
        leases, lease, handover=lambda: False, renew_seconds=0.01, clock=clock, at_work=lambda: True, on_hang=ended.set
    )
    with downloading:
        for _ in range(5):
            clock.now += STALL_SECONDS - 1
            wait_for(leases, 2)
        assert downloading.renewing
        downloading.phase(Phase.TRAINING)
        clock.now += STALL_SECONDS + 1
        assert ended.wait(60)


@pytest.mark.parametrize("sign", ["phase", "micro-batch", "step"])
def test_every_sign_of_movement_keeps_the_lease(leases: Renewals, lease: Lease, sign: str) -> None:
    clock = Clock()
    with session(leases, lease, clock) as open_session:
        for _ in range(3):
            clock.now += STALL_SECONDS - 1
            if sign == "phase":
                open_session.phase(Phase.EVALUATING)
            elif sign == "micro-batch":
                assert not open_session.should_stop()
            else:
                open_session.progress(Progress(step=1))
            wait_for(leases, 2)
        assert open_session.renewing


def test_what_is_flushed_is_written(store: Jobs, leases: Renewals, lease: Lease) -> None:
    with session(leases, lease, Clock()) as open_session:
        for step in range(1, 6):
            open_session.progress(Progress(step=step, total_steps=9))
        open_session.event("written", data={"x": 1})
        open_session.flush()
        assert store.get("default", lease.job.id).progress.step == 5
        newest = store.events("default", lease.job.id, limit=1).items[0]
        assert (newest.message, newest.data) == ("written", {"x": 1})


def test_what_was_said_before_a_failure_is_written(store: Jobs, leases: Renewals, lease: Lease) -> None:
    def fail() -> None:
        with session(leases, lease, Clock()) as open_session:
            open_session.event("before")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.events("default", lease.job.id, limit=1).items[0].message == "before"


def test_a_database_that_is_away_stalls_no_training(
    store: Jobs, leases: Renewals, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise OperationalError("UPDATE", None, Exception("server closed the connection unexpectedly"))

    with session(leases, lease, Clock()) as open_session:
        with monkeypatch.context() as patch:
            patch.setattr(leases, "record", away)
            for step in range(1000):
                open_session.progress(Progress(step=step))
                assert not open_session.should_stop()
            open_session.event("one")
            open_session.phase(Phase.EVALUATING)
        open_session.event("two")
        open_session.flush()
    written = store.events("default", lease.job.id, limit=2).items
    assert [event.message for event in written] == ["two", "one"]
    job = store.get("default", lease.job.id)
    assert (job.progress.step, job.phase) == (999, Phase.EVALUATING)


def test_the_first_step_is_reported_with_its_time(store: Jobs, leases: Renewals, lease: Lease) -> None:
    clock = Clock()
    with session(leases, lease, clock) as open_session:
        clock.now += 0.5
        open_session.phase(Phase.TRAINING)
        clock.now += 2
        # A later phase of training is not the first.
        open_session.phase(Phase.TRAINING)
        open_session.first_step(base_loaded=False)
    newest = store.events("default", lease.job.id, limit=1).items[0]
    assert newest.data == {
        "claim_to_training_seconds": 0.5,
        "claim_to_first_step_seconds": 2.5,
        "base_loaded": False,
    }
    assert "warm" in newest.message
    assert store.get("default", lease.job.id).state is State.RUNNING
