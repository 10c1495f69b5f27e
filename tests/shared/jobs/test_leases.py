import multiprocessing
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import select, text, update

from shared.adapters.state import AdapterState
from shared.errors import InvalidRequest, LeaseLost, TunesmithError, Unavailable
from shared.jobs.fencing import Lease
from shared.jobs.heartbeats import Heartbeat, Heartbeats
from shared.jobs.leases import Leases
from shared.jobs.requeue import MAX_ATTEMPTS
from shared.jobs.rows import NewEvent
from shared.jobs.spec import TRANSITIONS, JobFault, JobSpec, Phase, Progress, RequestedAction, State
from shared.storage.database import Database
from shared.storage.tables import adapters, events, jobs
from tests.jobs import REPORT, Jobs


def claimed(leases: Leases, worker: str = "w") -> Lease:
    lease = leases.claim(worker)
    assert lease is not None
    return lease


def begun(leases: Leases) -> Lease:
    """Claimed by a worker that knows of it."""
    lease = claimed(leases)
    leases.renew(lease)
    return lease


def test_the_oldest_is_claimed_first_and_only_once(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    ids = [store.create("default", spec).id for _ in range(3)]
    assert [claimed(leases).job.id for _ in ids] == ids
    assert leases.claim("w") is None


def test_what_a_newer_version_left_is_not_claimed_nor_read(
    store: Jobs, leases: Leases, database: Database, spec: JobSpec
) -> None:
    first, second = (store.create("default", spec).id for _ in range(2))
    with database.write() as tx:
        # A newer schema allows more states.
        sqlite, postgresql = "PRAGMA ignore_check_constraints=ON", "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_state"
        tx.execute(text(sqlite if database.is_sqlite else postgresql))
        tx.execute(update(jobs).where(jobs.c.id == second).values(state="dreaming"))
    assert store.get("default", first).state is State.QUEUED
    with pytest.raises(Unavailable, match="newer version"):
        store.get("default", second)
    with database.write() as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(TunesmithError, match="newer version") as refused:
        leases.claim("w")
    assert refused.value.code == "schema"
    assert store.get("default", first).attempt == 0


def test_success_publishes_the_adapter_with_the_job(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec.model_copy(update={"suffix": "docs"}))
    lease = claimed(leases)
    leases.record(lease, [NewEvent("half way")], phase=Phase.TRAINING, progress=Progress(step=2, total_steps=5))
    assert store.get("default", job.id).phase is Phase.TRAINING
    leases.succeed(lease, leases.reserve_adapter(lease), REPORT)
    done = store.get("default", job.id)
    assert (done.state, done.report, done.phase) == (State.SUCCEEDED, REPORT, None)
    assert done.adapter_name == f"ft:tiny:default:docs:{job.id[6:18]}"
    assert done.finished_at is not None


def test_every_write_of_a_lost_worker_is_refused(
    store: Jobs, leases: Leases, heartbeats: Heartbeats, spec: JobSpec
) -> None:
    job = store.create("default", spec)
    lease = claimed(leases)
    adapter = leases.reserve_adapter(lease)
    (sign,) = heartbeats.read()
    assert heartbeats.expire(sign)
    before = store.events("default", job.id).items
    for write in (
        lambda: leases.renew(lease),
        lambda: leases.record(lease, [NewEvent("late")]),
        lambda: leases.reserve_adapter(lease),
        lambda: leases.commit_checkpoint(lease, 1, adapter, {}),
        lambda: leases.succeed(lease, adapter, REPORT),
        lambda: leases.fail(lease, JobFault(code="x", message="late")),
        lambda: leases.release(lease, "late"),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert store.events("default", job.id).items == before
    with store.database.read() as connection:
        assert connection.execute(select(adapters.c.state)).scalars().all() == [AdapterState.RESERVED]


def test_an_adapter_of_an_earlier_lease_cannot_be_published(
    store: Jobs, leases: Leases, heartbeats: Heartbeats, spec: JobSpec
) -> None:
    store.create("default", spec)
    stale = leases.reserve_adapter(claimed(leases))
    heartbeats.expire(heartbeats.read()[0])
    with pytest.raises(LeaseLost):
        leases.succeed(claimed(leases), stale, REPORT)


def test_life_shown_in_time_keeps_the_lease(store: Jobs, leases: Leases, heartbeats: Heartbeats, spec: JobSpec) -> None:
    store.create("default", spec)
    lease = claimed(leases)
    (seen,) = heartbeats.read()
    leases.renew(lease)
    assert not heartbeats.expire(seen)
    assert leases.renew(lease) is RequestedAction.NONE


def test_three_failures_end_the_job_and_progress_forgives(
    store: Jobs, leases: Leases, heartbeats: Heartbeats, spec: JobSpec
) -> None:
    job = store.create("default", spec)
    for step in range(1, 6):
        lease = begun(leases)
        leases.commit_checkpoint(lease, step, leases.reserve_adapter(lease), {})
        heartbeats.expire(heartbeats.read()[0])
    assert store.get("default", job.id).worker_failures == 1
    for _ in range(MAX_ATTEMPTS - 1):
        # The same step again is no progress.
        lease = begun(leases)
        leases.commit_checkpoint(lease, 5, leases.reserve_adapter(lease), {})
        heartbeats.expire(heartbeats.read()[0])
    failed = store.get("default", job.id)
    assert failed.state is State.FAILED
    assert failed.fault is not None
    assert failed.fault.code == "worker_lost"
    assert failed.attempt == 7


def test_handing_over_counts_as_no_failure(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec)
    for _ in range(5):
        assert leases.release(claimed(leases), "the worker is stopping") is State.QUEUED
    assert store.get("default", job.id).worker_failures == 0


def test_a_fault_of_the_system_is_tried_again_and_counts(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec)
    lease = claimed(leases)
    leases.requeue(lease, "OSError: {no space} left")
    with pytest.raises(LeaseLost):
        leases.requeue(lease, "again")
    assert (store.get("default", job.id).state, store.get("default", job.id).worker_failures) == (State.QUEUED, 1)
    assert "OSError: {no space} left" in store.events("default", job.id, limit=2).items[1].message


@pytest.mark.parametrize(("action", "end"), [("pause", State.PAUSED), ("cancel", State.CANCELLED)])
@pytest.mark.parametrize("lost", [True, False])
def test_a_requested_action_is_carried_out_with_or_without_its_worker(
    store: Jobs, leases: Leases, heartbeats: Heartbeats, spec: JobSpec, action: str, end: State, lost: bool
) -> None:
    job = store.create("default", spec)
    lease = claimed(leases)
    getattr(store, action)("default", job.id)
    if lost:
        heartbeats.expire(heartbeats.read()[0])
    else:
        leases.release(lease, "as asked")
    assert store.get("default", job.id).state is end


def test_what_stops_a_job_for_good_is_said(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec)
    for _ in range(MAX_ATTEMPTS):
        leases.requeue(claimed(leases), "OSError: [Errno 28] No space left on device")
    fault = store.get("default", job.id).fault
    assert fault is not None
    assert fault.message.endswith(
        "the last time the worker could not go on: OSError: [Errno 28] No space left on device"
    )


def test_a_checkpoint_whose_commit_was_answered_by_nobody_is_committed_once(
    store: Jobs, leases: Leases, spec: JobSpec
) -> None:
    job = store.create("default", spec)
    lease = claimed(leases)
    adapter = leases.reserve_adapter(lease)
    assert [leases.commit_checkpoint(lease, 5, adapter, {}).adapter for _ in range(2)] == [adapter, adapter]
    assert [checkpoint.adapter for checkpoint in store.checkpoints("default", job.id).items] == [adapter]
    told = [event.message for event in store.events("default", job.id, after=0, limit=50).items]
    assert told.count("Checkpoint saved at step 5") == 1


def test_a_step_committed_again_keeps_its_adapter(
    store: Jobs, leases: Leases, heartbeats: Heartbeats, spec: JobSpec
) -> None:
    job = store.create("default", spec)
    lease = claimed(leases)
    first = leases.reserve_adapter(lease)
    assert leases.commit_checkpoint(lease, 3, first, {"train_loss": 1.5}).adapter == first
    heartbeats.expire(heartbeats.read()[0])
    lease = claimed(leases)
    assert leases.commit_checkpoint(lease, 3, leases.reserve_adapter(lease), {}).adapter == first
    (checkpoint,) = store.checkpoints("default", job.id).items
    assert (checkpoint.adapter, checkpoint.lease_token, checkpoint.metrics) == (first, lease.token, {"train_loss": 1.5})
    assert checkpoint.adapter_name.endswith(":ckpt-step-3")


def steps(store: Jobs, job_id: str) -> list[int]:
    return [checkpoint.step for checkpoint in store.checkpoints("default", job_id, limit=50).items]


def test_the_newest_checkpoints_and_the_best_stay(
    store: Jobs, leases: Leases, database: Database, spec: JobSpec
) -> None:
    job = store.create("default", spec.model_copy(update={"keep_checkpoints": 2}))
    lease = claimed(leases)
    removed: list[str] = []
    reserved = {}
    for step, loss in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.5)):
        reserved[step] = leases.reserve_adapter(lease)
        removed += leases.commit_checkpoint(lease, step, reserved[step], {"valid_loss": loss}).removed
    assert steps(store, job.id) == [5, 4, 2]
    assert removed == [reserved[1], reserved[3]]
    with database.read() as tx:
        published = tx.scalars(select(adapters.c.id).where(adapters.c.state == AdapterState.PUBLISHED))
        assert set(published) == {reserved[step] for step in (2, 4, 5)}
    # Nothing could be resumed from: what was let go is trained again, under the name it had, and can be resumed from.
    again = leases.reserve_adapter(lease)
    assert leases.commit_checkpoint(lease, 1, again, {"valid_loss": 3.0}).removed == ()
    assert steps(store, job.id) == [5, 4, 2, 1]
    assert leases.commit_checkpoint(lease, 3, leases.reserve_adapter(lease), {"valid_loss": 1.0}).removed == (again,)
    assert steps(store, job.id) == [5, 4, 3, 2]


def test_without_validation_the_newest_checkpoints_stay(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec)
    lease = claimed(leases)
    for step in range(1, 7):
        leases.commit_checkpoint(lease, step, leases.reserve_adapter(lease), {"train_loss": 1.0})
    assert steps(store, job.id) == [6, 5, 4]


def test_a_checkpoint_that_another_job_continues_stays(store: Jobs, leases: Leases, spec: JobSpec) -> None:
    job = store.create("default", spec.model_copy(update={"keep_checkpoints": 2}))
    lease = claimed(leases)
    first = leases.reserve_adapter(lease)
    leases.commit_checkpoint(lease, 1, first, {})
    child = store.create("default", spec.model_copy(update={"initial_adapter": first}))
    for step in (2, 3, 4):
        leases.commit_checkpoint(lease, step, leases.reserve_adapter(lease), {})
    assert steps(store, job.id) == [4, 3, 1]
    store.cancel("default", child.id)
    assert leases.commit_checkpoint(lease, 5, leases.reserve_adapter(lease), {}).removed[-1] == first
    assert steps(store, job.id) == [5, 4]


def _work(url: str, worker: str) -> list[str]:
    """Claim and finish jobs until none is left, losing the lease of every fourth on the way."""
    database = Database(url)
    leases, heartbeats = Leases(database), Heartbeats(database)
    done = []
    turn = 0
    while True:
        lease = leases.claim(worker)
        if lease is None:
            break
        turn += 1
        leases.record(lease, [NewEvent("step")], progress=Progress(step=turn))
        if turn % 4 == 0 and lease.job.worker_failures == 0:
            heartbeats.expire(Heartbeat(lease.job.id, lease.token, 0))
            continue
        leases.renew(lease)
        leases.succeed(lease, leases.reserve_adapter(lease), REPORT)
        done.append(lease.job.id)
    database.close()
    return done


@pytest.mark.slow
def test_four_processes_at_one_database_lose_and_double_nothing(
    database: Database, database_url: str, store: Jobs, spec: JobSpec
) -> None:
    ids = [store.create("default", spec).id for _ in range(40)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        results = pool.starmap(_work, [(database_url, f"w{n}") for n in range(4)])
        pool.close()
        pool.join()
    assert Counter(job for done in results for job in done) == Counter(ids)
    with database.read() as connection:
        assert set(connection.execute(select(jobs.c.state)).scalars()) == {State.SUCCEEDED}
        assert (
            len(connection.execute(select(adapters.c.id).where(adapters.c.state == AdapterState.PUBLISHED)).all()) == 40
        )
        numbers = connection.execute(
            select(events.c.job, events.c.number).order_by(events.c.job, events.c.number)
        ).all()
    per_job: dict[str, list[int]] = {}
    for job, number in numbers:
        per_job.setdefault(job, []).append(number)
    assert all(found == list(range(1, len(found) + 1)) for found in per_job.values())


class JobLife(RuleBasedStateMachine):
    """Whatever clients, workers and reapers do in whatever order, a job only makes legal moves and ends once."""

    database: Database
    spec: JobSpec

    def __init__(self) -> None:
        super().__init__()
        self.store, self.leases = Jobs(self.database), Leases(self.database)
        self.heartbeats = Heartbeats(self.database)
        # Each example has a project of its own and empties the queue before it begins.
        while (lease := self.leases.claim("cleaner")) is not None:
            self.leases.fail(lease, JobFault(code="cleaned", message="left by the previous example"))
        for sign in self.heartbeats.read():
            self.heartbeats.expire(sign)
        while (lease := self.leases.claim("cleaner")) is not None:
            self.leases.fail(lease, JobFault(code="cleaned", message="left by the previous example"))
        self.job = self.store.create("default", self.spec).id
        self.state = State.QUEUED
        self.held: list[Lease] = []

    def live(self) -> Lease | None:
        return self.held[-1] if self.held and self.state.leased else None

    @rule()
    def claim(self) -> None:
        lease = self.leases.claim("w")
        assert (lease is not None) == (self.state is State.QUEUED)
        if lease:
            assert all(lease.token > old.token for old in self.held)
            self.held.append(lease)

    @rule(action=st.sampled_from(["cancel", "pause", "resume"]))
    def request(self, action: str) -> None:
        try:
            getattr(self.store, action)("default", self.job)
        except InvalidRequest:
            assert self.state.final or self.state.leased

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9), action=st.sampled_from(["renew", "record", "release", "fail", "succeed"]))
    def work(self, which: int, action: str) -> None:
        lease = self.held[which % len(self.held)]
        try:
            if action == "renew":
                self.leases.renew(lease)
            elif action == "record":
                self.leases.record(lease, [NewEvent("x")])
            elif action == "release":
                self.leases.release(lease, "x")
            elif action == "fail":
                self.leases.fail(lease, JobFault(code="x", message="x"))
            else:
                self.leases.succeed(lease, self.leases.reserve_adapter(lease), REPORT)
        except LeaseLost:
            assert lease is not self.live()
        else:
            assert lease is self.live()

    @rule()
    def reap(self) -> None:
        for sign in self.heartbeats.read():
            assert self.heartbeats.expire(sign)

    @invariant()
    def only_legal_moves(self) -> None:
        now = self.store.get("default", self.job)
        assert now.state is self.state or now.state in TRANSITIONS[self.state]
        assert (now.finished_at is not None) == now.state.final
        assert (now.adapter_name is not None) == (now.state is State.SUCCEEDED)
        self.state = now.state


def test_any_life_of_a_job_is_legal(database: Database, spec: JobSpec) -> None:
    machine = type("Machine", (JobLife,), {"database": database, "spec": spec})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
