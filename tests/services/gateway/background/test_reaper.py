"""The reaper on a clock of the test's own, over real SQLite and a real Redis-protocol server."""

import socket
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from services.gateway.background.notifier import CHECK_EVERY_SECONDS, Notifier
from services.gateway.background.reaper import LATE_SECONDS, LEASE_SECONDS, Reaper
from shared.jobs.fencing import Lease
from shared.jobs.heartbeats import Heartbeat, Heartbeats
from shared.jobs.leases import Leases
from shared.jobs.notification import SOCKET_TIMEOUT_SECONDS, NotificationQueue
from shared.jobs.requeue import MAX_ATTEMPTS
from shared.jobs.spec import JobSpec, State
from shared.storage.database import Database, migrate
from tests.jobs import Jobs

SPEC = JobSpec(base="tiny", base_revision="r1", training_file="file-1", training_sha256="0" * 64)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Scene:
    store: Jobs
    leases: Leases
    heartbeats: Heartbeats
    notifications: NotificationQueue
    clock: Clock
    notifier: Notifier
    reaper: Reaper

    def pass_time(self, seconds: float, *, alive: Lease | None = None) -> None:
        """Second by second, as the threads tick; `alive` is renewed every 5 s."""
        for second in range(int(seconds)):
            self.clock.now += 1
            if alive and second % 5 == 0:
                self.leases.renew(alive)
            self.reaper.tick()
            self.notifier.tick()

    def claimed(self) -> Lease:
        lease = self.leases.claim("worker-1")
        assert lease is not None
        self.leases.renew(lease)
        return lease

    def state(self, lease: Lease) -> State:
        return self.store.get("default", lease.job.id).state


@pytest.fixture
def scene(tmp_path: Path, redis_url: str) -> Iterator[Scene]:
    url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    migrate(url)
    database, notifications, clock = Database(url), NotificationQueue(redis_url), Clock()
    heartbeats = Heartbeats(database)
    notifier = Notifier(notifications, heartbeats.queued, clock=clock)
    reaper = Reaper(heartbeats, notifier.notify, clock=clock)
    yield Scene(Jobs(database), Leases(database), heartbeats, notifications, clock, notifier, reaper)
    notifications.close()
    database.close()


def test_a_worker_that_renews_keeps_its_job(scene: Scene) -> None:
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.pass_time(10 * LEASE_SECONDS, alive=lease)
    assert scene.state(lease) is State.RUNNING


def test_a_silent_workers_job_goes_to_the_next_one(scene: Scene) -> None:
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.reaper.tick()
    scene.pass_time(LEASE_SECONDS - 1)
    assert scene.state(lease) is State.RUNNING
    scene.pass_time(1)
    assert scene.state(lease) is State.QUEUED
    assert scene.notifications.pending() == 1
    again = scene.claimed()
    assert (again.job.id, again.job.attempt) == (lease.job.id, 2)
    assert again.token > lease.token
    log = [event.message for event in scene.store.events("default", lease.job.id, after=0, limit=100).items]
    assert "Worker worker-1 was lost" in log
    assert log[-1] == "Started again (attempt 2) on worker worker-1"


def test_one_sign_of_life_starts_the_count_again(scene: Scene) -> None:
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.reaper.tick()
    scene.pass_time(LEASE_SECONDS - 1)
    scene.leases.renew(lease)
    scene.pass_time(LEASE_SECONDS)
    assert scene.state(lease) is State.RUNNING
    scene.pass_time(1)
    assert scene.state(lease) is State.QUEUED


def test_a_reaper_that_starts_gives_everybody_its_full_time(scene: Scene) -> None:
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.clock.now += 1_000_000
    scene.reaper.tick()
    assert scene.state(lease) is State.RUNNING


def test_a_claim_whose_answer_was_lost_is_not_counted(scene: Scene) -> None:
    job = scene.store.create("default", SPEC)
    for _ in range(MAX_ATTEMPTS):
        # The worker never learns of it.
        assert scene.leases.claim("worker-1") is not None
        scene.pass_time(20)
    now = scene.store.get("default", job.id)
    assert (now.state, now.worker_failures, now.attempt) == (State.QUEUED, 0, MAX_ATTEMPTS)
    told = [event.message for event in scene.store.events("default", job.id, after=0, limit=50).items]
    assert told.count("Worker worker-1 did not begin; the answer to its claim may have been lost") == MAX_ATTEMPTS


def test_a_look_that_takes_long_says_nothing_about_workers(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that swallows answers keeps workers from renewing, and the first look after it comes through late."""
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.pass_time(2)
    read = scene.heartbeats.read

    def slow() -> list[Heartbeat]:
        found = read()
        scene.clock.now += 2 * LEASE_SECONDS
        return found

    with monkeypatch.context() as patch:
        patch.setattr(scene.heartbeats, "read", slow)
        scene.pass_time(1)
    scene.pass_time(LEASE_SECONDS - 1)
    assert scene.state(lease) is State.RUNNING
    scene.pass_time(3)
    assert scene.state(lease) is State.QUEUED


def test_two_reapers_take_a_job_once(scene: Scene) -> None:
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    other = Reaper(scene.heartbeats, scene.notifier.notify, clock=scene.clock)
    for _ in range(int(LEASE_SECONDS) + 2):
        scene.clock.now += 1
        scene.reaper.tick()
        other.tick()
    assert scene.state(lease) is State.QUEUED
    assert scene.store.get("default", lease.job.id).worker_failures == 1


def test_a_job_that_kills_its_workers_fails_and_the_queue_goes_on(scene: Scene) -> None:
    poison = scene.store.create("default", SPEC)
    healthy = scene.store.create("default", SPEC)
    for _ in range(MAX_ATTEMPTS):
        assert scene.claimed().job.id == poison.id
        scene.pass_time(LEASE_SECONDS + 1)
    failed = scene.store.get("default", poison.id)
    assert failed.state is State.FAILED
    assert failed.fault is not None
    assert failed.fault.code == "worker_lost"
    assert scene.claimed().job.id == healthy.id


@pytest.mark.parametrize(("verb", "state"), [("cancel", State.CANCELLED), ("pause", State.PAUSED)])
def test_what_a_lost_worker_was_asked_for_is_done_without_it(scene: Scene, verb: str, state: State) -> None:
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    getattr(scene.store, verb)("default", lease.job.id)
    scene.pass_time(LEASE_SECONDS + 1)
    assert scene.state(lease) is state


def test_lost_notifications_are_sent_again_and_taken_ones_are_not(scene: Scene) -> None:
    for _ in range(3):
        scene.store.create("default", SPEC)
    assert scene.notifications.pending() == 0
    scene.pass_time(1)
    assert scene.notifications.pending() == 3
    scene.pass_time(3 * CHECK_EVERY_SECONDS)
    assert scene.notifications.pending() == 3


def test_a_flushed_redis_is_filled_again(scene: Scene, redis_url: str) -> None:
    from redis import Redis

    scene.store.create("default", SPEC)
    scene.pass_time(1)
    with Redis.from_url(redis_url) as client:
        client.flushall()
    scene.pass_time(CHECK_EVERY_SECONDS)
    assert scene.notifications.pending() == 1


def test_an_empty_queue_sends_no_notification(scene: Scene) -> None:
    scene.store.create("default", SPEC)
    scene.claimed()
    scene.pass_time(CHECK_EVERY_SECONDS)
    assert scene.notifications.pending() == 0


@pytest.fixture(params=["refuses", "silent"])
def redis_away(request: pytest.FixtureRequest) -> Iterator[NotificationQueue]:
    """A Redis that cannot be reached, and one that is stopped: its connections are taken and nothing comes back."""
    with socket.socket() as listening:
        if request.param == "silent":
            listening.bind(("127.0.0.1", 0))
            listening.listen(16)
        port = listening.getsockname()[1] if request.param == "silent" else 9
        queue = NotificationQueue(f"redis://127.0.0.1:{port}/0")
        yield queue
        queue.close()


def test_without_redis_every_silent_workers_job_is_taken_in_one_look(
    scene: Scene, redis_away: NotificationQueue
) -> None:
    notifier = Notifier(redis_away, scene.heartbeats.queued)
    reaper = Reaper(scene.heartbeats, notifier.notify, clock=scene.clock)
    held = []
    for _ in range(3):
        scene.store.create("default", SPEC)
        held.append(scene.claimed())
    notifier.start()
    started = time.monotonic()
    for _ in range(int(LEASE_SECONDS) + 1):
        reaper.tick()
        scene.clock.now += 1
    assert [scene.state(lease) for lease in held] == [State.QUEUED] * 3
    # Faster than one attempt at a silent Redis, which ends after `SOCKET_TIMEOUT_SECONDS`.
    assert time.monotonic() - started < SOCKET_TIMEOUT_SECONDS
    notifier.stop()


def test_while_the_database_is_away_nobodys_time_runs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers cannot show life in a database that is not there."""
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.reaper.tick()

    def away() -> list[Heartbeat]:
        raise OSError("the database is away")

    with monkeypatch.context() as while_away:
        while_away.setattr(scene.heartbeats, "read", away)
        scene.clock.now += 10 * LEASE_SECONDS
        with pytest.raises(OSError, match="away"):
            scene.reaper.tick()
    scene.reaper.tick()
    assert scene.state(lease) is State.RUNNING
    scene.pass_time(LEASE_SECONDS)
    assert scene.state(lease) is State.QUEUED


def test_a_late_look_says_nothing_about_workers(scene: Scene) -> None:
    """The gateway was stopped, or waited for the database: workers may have shown life, or could not."""
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.pass_time(LEASE_SECONDS - 1)
    scene.clock.now += 60
    scene.reaper.tick()
    assert scene.state(lease) is State.RUNNING
    scene.pass_time(LEASE_SECONDS - 1)
    assert scene.state(lease) is State.RUNNING
    scene.pass_time(1)
    assert scene.state(lease) is State.QUEUED


def test_after_an_outage_of_writes_workers_get_their_full_time_again(scene: Scene, tmp_path: Path) -> None:
    """Reads answer and writes do not: a stopped process holds the lock, or the database's disk is full."""
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.pass_time(LEASE_SECONDS)
    holder = sqlite3.connect(tmp_path / "tunesmith.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    scene.clock.now += 1
    with pytest.raises(OperationalError, match="locked"):
        scene.reaper.tick()
    holder.execute("ROLLBACK")
    holder.close()
    scene.pass_time(LEASE_SECONDS, alive=lease)
    assert scene.state(lease) is State.RUNNING
    assert scene.store.get("default", lease.job.id).worker_failures == 0


def test_a_write_that_had_to_wait_takes_no_job(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever held the reaper's write back held the workers' renewals back as well."""
    scene.store.create("default", SPEC)
    lease = scene.claimed()
    scene.pass_time(LEASE_SECONDS)

    def slow() -> None:
        scene.clock.now += LATE_SECONDS

    with monkeypatch.context() as while_slow:
        while_slow.setattr(scene.heartbeats, "check_writable", slow)
        scene.clock.now += 1
        scene.reaper.tick()
    assert scene.state(lease) is State.RUNNING
    scene.pass_time(LEASE_SECONDS + 1)
    assert scene.state(lease) is State.QUEUED


def test_the_thread_outlives_a_database_that_is_away(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[int] = []

    def fail() -> None:
        ticks.append(1)
        raise OSError("the database is away")

    monkeypatch.setattr(scene.reaper, "tick", fail)
    monkeypatch.setattr("services.gateway.background.reaper.TICK_SECONDS", 0.01)
    scene.reaper.start()
    deadline = time.monotonic() + 120
    while len(ticks) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    scene.reaper.stop()
    assert len(ticks) >= 3
