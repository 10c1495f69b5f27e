from shared.jobs.leases import Leases
from shared.jobs.spec import JobSpec
from tests.jobs import Jobs


def test_jobs_of_the_same_nanosecond_page_without_loss(store: Jobs, spec: JobSpec) -> None:
    frozen = Jobs(store.database, now=lambda: 1_700_000_000_000_000_000)
    created = {frozen.create("default", spec).id for _ in range(4)}
    seen: list[str] = []
    while True:
        page = frozen.list("default", after=seen[-1] if seen else None, limit=1)
        seen += [job.id for job in page.items]
        if not page.has_more:
            break
    assert len(seen) == 4
    assert set(seen) == created


def test_queue_positions_count_the_jobs_of_all_projects(store: Jobs, spec: JobSpec) -> None:
    created = [store.create(project, spec).id for project in "abacab"]
    page = store.list("a", limit=2)
    assert [job.id for job in page.items] == [created[4], created[2]]
    assert [job.progress.queue_position for job in page.items] == [5, 3]
    assert [job.progress.queue_position for job in store.list("b").items] == [6, 2]
    store.cancel("b", created[1])
    assert [job.progress.queue_position for job in store.list("b").items] == [5, None]


def test_queue_positions_follow_age(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    ids = [store.create("default", spec).id for _ in range(3)]
    assert [store.get("default", i).progress.queue_position for i in ids] == [1, 2, 3]
    leases.claim("w")
    assert [store.get("default", i).progress.queue_position for i in ids] == [None, 1, 2]
