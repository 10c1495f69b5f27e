import pytest

from shared.errors import InvalidRequest, NotFound
from shared.jobs.leases import Leases
from shared.jobs.spec import JobSpec, RequestedAction, State
from tests.jobs import Jobs


def test_a_new_job_is_queued_and_its_story_begins_at_one(store: Jobs, spec: JobSpec) -> None:
    job = store.create("default", spec, metadata={"team": "a"}, warnings=["few rows"])
    assert job == store.get("default", job.id)
    assert (job.state, job.spec, job.metadata, job.warnings) == (State.QUEUED, spec, {"team": "a"}, ["few rows"])
    story = store.events("default", job.id, after=0).items
    assert [event.number for event in story] == [1, 2, 3]
    assert [event.level for event in story] == ["info", "warn", "info"]


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
    for wish in (store.pause, store.resume):
        with pytest.raises(InvalidRequest, match="cancelled"):
            wish("default", job.id)
