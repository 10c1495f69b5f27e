import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from shared.errors import InvalidRequest, NotFound
from shared.jobs.leases import Leases
from shared.jobs.rows import NewEvent
from shared.jobs.spec import JobSpec, RequestedAction, State
from shared.jobs.store import JobStore
from shared.storage.database import Database
from shared.storage.tables import jobs
from tests.jobs import Jobs


def test_a_new_job_is_queued_and_its_events_begin_at_one(store: Jobs, spec: JobSpec) -> None:
    job = store.create("default", spec, metadata={"team": "a"}, warnings=["few rows"])
    assert job == store.get("default", job.id)
    assert (job.state, job.spec, job.metadata, job.warnings) == (State.QUEUED, spec, {"team": "a"}, ["few rows"])
    log = store.events("default", job.id, after=0).items
    assert [event.number for event in log] == [1, 2, 3]
    assert [event.level for event in log] == ["info", "warn", "info"]


def test_another_project_sees_nothing(store: Jobs, spec: JobSpec) -> None:
    job = store.create("a", spec)
    for call in (store.get, store.cancel, store.pause, store.resume, store.events, store.checkpoints):
        with pytest.raises(NotFound):
            call("b", job.id)
    assert store.list("b").items == []
    with pytest.raises(InvalidRequest):
        store.list("b", after=job.id)


def test_pages_are_complete_and_in_order(store: Jobs, spec: JobSpec) -> None:
    created = [store.create("default", spec, metadata={"n": str(n % 2)}).id for n in range(5)]
    first = store.list("default", limit=2)
    second = store.list("default", after=first.items[-1].id, limit=2)
    third = store.list("default", after=second.items[-1].id, limit=2)
    assert [job.id for page in (first, second, third) for job in page.items] == created[::-1]
    assert [page.has_more for page in (first, second, third)] == [True, True, False]
    assert [job.id for job in store.list("default", metadata={"n": "1"}).items] == [created[3], created[1]]


def test_events_page_downwards_and_upwards(store: Jobs, spec: JobSpec) -> None:
    job = store.create("default", spec, warnings=["a", "b", "c"])
    newest = store.events("default", job.id, limit=2)
    assert [event.number for event in newest.items] == [5, 4]
    assert newest.has_more
    rest = store.events("default", job.id, before=4, limit=10)
    assert [event.number for event in rest.items] == [3, 2, 1]
    assert not rest.has_more
    assert [event.number for event in store.events("default", job.id, after=3).items] == [4, 5]


def test_what_waits_is_cancelled_at_once_and_twice_is_once(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec)
    assert store.cancel("default", job.id).state is State.CANCELLED
    events = len(store.events("default", job.id).items)
    again = store.cancel("default", job.id)
    assert again.finished_at is not None
    assert len(store.events("default", job.id).items) == events
    assert leases.claim("w") is None


def test_what_runs_is_asked(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec)
    lease = leases.claim("w")
    assert lease is not None
    assert leases.renew(lease) is RequestedAction.NONE
    assert store.pause("default", job.id).state is State.PAUSING
    assert leases.renew(lease) is RequestedAction.PAUSE
    assert store.cancel("default", job.id).state is State.CANCELLING
    assert leases.renew(lease) is RequestedAction.CANCEL
    with pytest.raises(InvalidRequest, match="cancelling"):
        store.pause("default", job.id)


def test_pause_and_resume(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec)
    assert store.pause("default", job.id).state is State.PAUSED
    assert leases.claim("w") is None
    assert store.resume("default", job.id).state is State.QUEUED
    assert store.resume("default", job.id).state is State.QUEUED
    assert leases.claim("w") is not None


def test_the_end_is_final(store: Jobs, spec: JobSpec) -> None:
    job = store.create("default", spec)
    store.cancel("default", job.id)
    for request in (store.pause, store.resume):
        with pytest.raises(InvalidRequest, match="cancelled"):
            request("default", job.id)


@pytest.mark.parametrize(("action", "end"), [("cancel", State.CANCELLING), ("pause", State.PAUSING)])
def test_an_action_requested_while_a_worker_claims_reaches_that_worker(
    database: Database, store: Jobs, leases: Leases, spec: JobSpec, action: str, end: State
) -> None:
    """The row is read for what is decided by it: a claim that commits in between must not make the request vanish."""
    job = store.create("default", spec)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as tx:
            tx.execute(update(jobs).where(jobs.c.id == job.id).values(state=State.RUNNING, lease_token=1))
            requested = pool.submit(getattr(store, action), "default", job.id)
            time.sleep(0.2)
            assert not requested.done()
        assert requested.result(timeout=120).state is end
    assert store.get("default", job.id).state is end


def test_metrics_page_by_step_and_the_last_report_of_a_step_wins(
    database: Database, store: Jobs, leases: Leases, spec: JobSpec
) -> None:
    job = store.create("default", spec)
    lease = leases.claim("w")
    assert lease is not None
    # Steps 1 to 6, and 2 to 6 three times more after a worker was lost.
    for attempt, first in enumerate((1, 2, 2, 2)):
        points = [{"step": step, "train_loss": float(attempt)} for step in range(first, 7)]
        leases.record(lease, [NewEvent("m", type="metrics", data=point) for point in points])
    metrics = JobStore().metrics
    with database.read() as tx:
        first_page = metrics(tx, "default", job.id, after_step=0, limit=4)
        rest = metrics(tx, "default", job.id, after_step=4, limit=4)
        with pytest.raises(NotFound):
            metrics(tx, "another", job.id, after_step=0, limit=4)
    assert ([point["step"] for point in first_page.items], first_page.has_more) == ([1, 2, 3, 4], True)
    assert [point["train_loss"] for point in first_page.items] == [0, 3, 3, 3]
    assert ([point["step"] for point in rest.items], rest.has_more) == ([5, 6], False)
