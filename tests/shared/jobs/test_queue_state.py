"""The queue and its workers as figures, on both databases."""

from shared.jobs.heartbeats import Heartbeats
from shared.jobs.leases import Leases
from shared.jobs.queue_state import QueueState
from shared.jobs.requeue import AttemptEnd
from shared.jobs.spec import JobFault, JobSpec, Progress
from shared.jobs.workers import PRESENT_SECONDS, Workers
from shared.storage.database import Database
from tests.jobs import REPORT, Jobs

NONE = dict.fromkeys(AttemptEnd, 0)


def test_each_way_in_which_an_attempt_ends_before_its_job_is_counted(
    database: Database, store: Jobs, leases: Leases, heartbeats: Heartbeats, spec: JobSpec
) -> None:
    state = QueueState(database)
    # Every reason has its row from the start: an increase from nothing would be missed.
    assert dict(state.read().attempts) == NONE
    store.create("default", spec)

    def claimed(renewed: bool = True):  # type: ignore[no-untyped-def]
        lease = leases.claim("w")
        assert lease is not None
        if renewed:
            leases.renew(lease)
        return lease

    leases.hand_back(claimed(), "the disk is full")
    leases.release(claimed(), "Stopped")
    leases.requeue(claimed(), "a fault")
    claimed()
    (beat,) = heartbeats.read()
    assert heartbeats.expire(beat)
    assert not heartbeats.expire(beat)
    claimed(renewed=False)
    (beat,) = heartbeats.read()
    assert heartbeats.expire(beat)
    assert dict(state.read().attempts) == dict.fromkeys(AttemptEnd, 1)


def test_figures_of_jobs(database: Database, leases: Leases, spec: JobSpec) -> None:
    now = 1_000.0
    store = Jobs(database, lambda: int(now * 1e9))
    state = QueueState(database, lambda: int(now * 1e9))
    assert (state.read().oldest_queued_seconds, state.read().tokens) == (0, 0)
    for _ in range(5):
        store.create("default", spec)
        now += 10
    lease = leases.claim("w")
    assert lease is not None
    leases.succeed(lease, leases.reserve_adapter(lease), REPORT)
    for code in ("out_of_memory", "out_of_memory"):
        lease = leases.claim("w")
        assert lease is not None
        leases.fail(lease, JobFault(code=code, message="m"))
    lease = leases.claim("w")
    assert lease is not None
    leases.record(lease, [], progress=Progress(step=1, tokens_per_second=12.5))
    figures = state.read()
    assert dict(figures.jobs) == {"queued": 1, "running": 1, "succeeded": 1, "failed": 2}
    assert dict(figures.failed) == {"out_of_memory": 2}
    assert (figures.oldest_queued_seconds, figures.tokens, figures.tokens_per_second) == (10, REPORT.total_tokens, 12.5)


def test_a_worker_is_there_until_it_says_that_it_goes_or_is_silent(database: Database) -> None:
    now = 1_000.0
    workers = Workers(database, lambda: int(now * 1e9))
    workers.seen("a", 1)
    workers.seen("a", 2)
    workers.seen("b", 1)
    workers.seen("a", 1)
    assert workers.count() == 3
    workers.gone("a", 2)
    assert workers.count() == 2
    now += PRESENT_SECONDS + 1
    workers.seen("b", 1)
    assert workers.count() == 1
