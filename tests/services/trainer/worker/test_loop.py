"""The worker's loop with the real store, the real recipe and the tiny base; only Celery is not here."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy.exc import OperationalError

from services.trainer.contract import Outcome
from services.trainer.model.bases import WarmBases
from services.trainer.recipe.finetune import finetune
from services.trainer.recipe.free_memory import FreeMemory, free_bytes
from services.trainer.worker import loop, retry
from services.trainer.worker.loop import Worker
from shared.bases.catalogue import Catalogue
from shared.errors import TunesmithError
from shared.jobs.checkpoints import Committed
from shared.jobs.fencing import Lease
from shared.jobs.heartbeats import Heartbeats
from shared.jobs.leases import Leases
from shared.jobs.rows import Event, Job
from shared.jobs.spec import Hyperparameters, JobSpec, State
from shared.jobs.worker_outages import ANY_BASE, WorkerOutage, WorkerOutages
from shared.storage.artifacts import LocalArtifactStore, new_id, sha256_of
from shared.storage.database import Database, migrate
from tests.jobs import Jobs
from tests.tiny import prepared_tiny


@dataclass
class Place:
    """One installation: store, database and whatever a test needs to make workers and jobs."""

    artifacts: LocalArtifactStore
    catalogue: Catalogue
    revision: str
    database: Database

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.database)
        self.leases = Leases(self.database)
        self.outages = WorkerOutages(self.database)
        self.bases = WarmBases(self.catalogue, self.artifacts, torch.device("cpu"))

    def worker(
        self,
        handover: Callable[[], bool] = lambda: False,
        artifacts: LocalArtifactStore | None = None,
        free_memory: FreeMemory = free_bytes,
        retry_seconds: float = 0,
        **options: Any,
    ) -> Worker:
        return Worker(
            self.leases,
            artifacts or self.artifacts,
            self.bases,
            name="w",
            outages=self.outages,
            handover=handover,
            renew_seconds=0.05,
            retry_seconds=retry_seconds,
            free_memory=free_memory,
            **options,
        )

    def job(self, rows: list[dict[str, str]], **hyperparameters: object) -> Job:
        file_id = new_id("file")
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with self.artifacts.staged() as staged:
            (staged / "data").write_bytes(data)
            self.artifacts.place(staged, self.artifacts.file(file_id))
        spec = JobSpec(
            base="tiny",
            base_revision=self.revision,
            training_file=file_id,
            training_sha256=hashlib.sha256(data).hexdigest(),
            hyperparameters=Hyperparameters.model_validate({"n_epochs": 2, "batch_size": 4} | hyperparameters),
        )
        return self.jobs.create("default", spec)

    def state(self, job: Job) -> State:
        return self.jobs.get("default", job.id).state

    def adapter_sha(self, job: Job) -> str:
        adapter = self.jobs.get("default", job.id).adapter
        assert adapter is not None
        return sha256_of(self.artifacts.adapter(adapter) / "adapter_model.safetensors")

    def first_step(self, job: Job) -> dict[str, Any]:
        events = self.jobs.events("default", job.id, after=0, limit=200).items
        (data,) = [event.data for event in events if "First optimizer" in event.message]
        assert data is not None
        return data

    def events(self, job: Job) -> list[Event]:
        return self.jobs.events("default", job.id, after=0, limit=200).items

    def messages(self, job: Job) -> list[str]:
        return [event.message for event in self.events(job)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    artifacts, base, _ = prepared_tiny(tmp_path)
    url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    migrate(url)
    database = Database(url)
    yield Place(artifacts, Catalogue((base,)), base.revision, database)
    database.close()


ROWS = [{"instruction": f"What is {n}?", "output": f"It is the number {n * 7}."} for n in range(12)]


def after(calls: int) -> Callable[[], bool]:
    """False for so many questions, then true."""
    asked = 0

    def handover() -> bool:
        nonlocal asked
        asked += 1
        return asked > calls

    return handover


def test_a_job_becomes_an_adapter_and_leaves_nothing_private(place: Place) -> None:
    job = place.job(ROWS)
    assert place.worker().drain_queue() == 1
    done = place.jobs.get("default", job.id)
    assert done.state is State.SUCCEEDED
    assert done.report is not None
    assert done.report.quantized_layers == 14
    assert done.report.steps == 6
    (started,) = [event.data for event in place.events(job) if event.message == "Started on worker w"]
    assert started == {"device": done.report.device} == {"device": "cpu"}
    assert done.adapter is not None
    place.artifacts.verify(place.artifacts.adapter(done.adapter), "adapter")
    assert [c.step for c in place.jobs.checkpoints("default", job.id).items] == [6, 3]
    assert not place.artifacts.checkpoints(job.id).exists()
    assert list((place.artifacts.root / "staging").iterdir()) == []


def test_the_second_job_finds_the_base_warm(place: Place) -> None:
    first, second = place.job(ROWS), place.job(ROWS)
    assert place.worker().drain_queue() == 2
    assert [place.first_step(job)["base_loaded"] for job in (first, second)] == [True, False]
    assert place.adapter_sha(first) == place.adapter_sha(second)


def test_short_memory_is_said_beforehand_with_the_numbers_that_fit_and_training_goes_on(place: Place) -> None:
    rows = [{"instruction": f"What is {n}?", "output": "It is a long answer. " * 100} for n in range(6)]
    worker = place.worker(free_memory=lambda device: 2_000_000)
    job = place.job(rows, n_epochs=1)
    assert worker.drain_queue() == 1
    assert place.state(job) is State.SUCCEEDED
    (warning,) = [event for event in place.events(job) if "are free" in event.message]
    assert warning.level == "warn"
    data = warning.data
    assert data is not None
    length, batch = data["max_length"], data["batch_size"]
    assert warning.message == (
        f"A micro-batch of 1,024 tokens needs about {data['needed_mb']:.0f} MB beside the base, 2 MB are free: "
        f"max_length {length} (now 512) with batch_size {batch} (now 4) would fit. Training is tried all the same"
    )
    assert 64 <= length < 512
    # A job with the numbers it named has room.
    again = place.job(rows, n_epochs=1, max_length=length, batch_size=batch)
    assert worker.drain_queue() == 1
    assert place.state(again) is State.SUCCEEDED
    assert not any("are free" in event.message for event in place.events(again))


def test_a_bad_job_fails_with_a_sentence_and_the_next_one_works(place: Place) -> None:
    bad = place.job([{"instruction": "long " * 200, "output": "cut off"}], max_length=16)
    good = place.job(ROWS, n_epochs=1)
    place.worker().drain_queue()
    failed = place.jobs.get("default", bad.id)
    assert failed.state is State.FAILED
    assert failed.fault is not None
    assert failed.fault.code == "invalid_training_file"
    assert place.state(good) is State.SUCCEEDED


@pytest.mark.parametrize("calls", [4, 8, 11, 14])
def test_a_handed_over_job_ends_with_the_bytes_of_an_uninterrupted_one(place: Place, calls: int) -> None:
    whole = place.job(ROWS, batch_size=2)
    place.worker().drain_queue()
    job = place.job(ROWS, batch_size=2)
    place.worker(handover=after(calls)).drain_queue()
    assert place.state(job) is State.QUEUED
    place.worker().drain_queue()
    assert place.state(job) is State.SUCCEEDED
    assert place.adapter_sha(job) == place.adapter_sha(whole)
    assert place.jobs.get("default", job.id).worker_failures == 0


@pytest.mark.parametrize(("action", "end"), [("pause", State.PAUSED), ("cancel", State.CANCELLED)])
def test_requested_actions_end_the_run_and_keep_its_checkpoints(
    place: Place, action: str, end: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = place.job(ROWS, n_epochs=50, checkpoint_steps=1)
    committed = place.leases.commit_checkpoint

    def commit_then_request(*args: object, **kwargs: object) -> Committed:
        done = committed(*args, **kwargs)  # type: ignore[arg-type]
        getattr(place.jobs, action)("default", job.id)
        return done

    monkeypatch.setattr(place.leases, "commit_checkpoint", commit_then_request)
    place.worker().drain_queue()
    assert place.state(job) is end
    kept = place.jobs.checkpoints("default", job.id, limit=200).items
    assert kept
    for checkpoint in kept:
        place.artifacts.verify(place.artifacts.adapter(checkpoint.adapter), "adapter")
    assert place.artifacts.checkpoints(job.id).exists() == (end is State.PAUSED)


def test_only_so_many_checkpoints_stay_on_disk_as_the_job_keeps(place: Place) -> None:
    job = place.job(ROWS, checkpoint_steps=1)
    place.worker().drain_queue()
    done = place.jobs.get("default", job.id)
    kept = place.jobs.checkpoints("default", job.id, limit=50).items
    assert [checkpoint.step for checkpoint in kept] == [6, 5, 4]
    on_disk = {folder.name for folder in (place.artifacts.root / "adapters").iterdir()}
    assert on_disk == {done.adapter, *(checkpoint.adapter for checkpoint in kept)}


class FullDisk(LocalArtifactStore):
    """A store whose disk is full for the first few publications."""

    failures = 1

    def publish(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        if FullDisk.failures:
            FullDisk.failures -= 1
            raise OSError(28, "No space left on device")
        return super().publish(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_full_disk_is_tried_again_and_leaves_nothing_half_written(place: Place) -> None:
    whole = place.job(ROWS)
    place.worker().drain_queue()
    job = place.job(ROWS)
    FullDisk.failures = 2
    place.worker(artifacts=FullDisk(place.artifacts.root)).drain_queue()
    assert place.state(job) is State.SUCCEEDED
    assert place.adapter_sha(job) == place.adapter_sha(whole)
    assert sum("No space left" in line for line in place.messages(job)) == 2
    assert list((place.artifacts.root / "staging").iterdir()) == []


def test_a_machine_without_its_mount_takes_no_job_for_longer_each_time_and_ends_none(place: Place) -> None:
    jobs = [place.job(ROWS, n_epochs=1) for _ in range(3)]
    files, away = place.artifacts.root / "files", place.artifacts.root / "away"
    files.rename(away)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        assert place.outages.read() == [WorkerOutage("w", ANY_BASE)]
        if len(pauses) == 7:
            away.rename(files)

    assert place.worker(retry_seconds=10, pause=pause).drain_queue() == 7 + 3
    assert pauses == [10, 20, 40, 80, 160, 300, 300]
    for job in jobs:
        done = place.jobs.get("default", job.id)
        assert (done.state, done.worker_failures) == (State.SUCCEEDED, 0)
    assert place.outages.read() == []
    assert any("is not in its artifacts folder" in line and "for 300 s" in line for line in place.messages(jobs[0]))


def test_no_job_is_claimed_while_the_folder_is_not_this_installations(place: Place) -> None:
    job = place.job(ROWS, n_epochs=1)
    pauses: list[float] = []
    foreign = True

    def check() -> None:
        if foreign:
            raise TunesmithError("another installation's", code="installation")

    worker = place.worker(retry_seconds=10, pause=pauses.append, check_folder=check)
    assert [worker.drain_queue(), worker.drain_queue()] == [0, 0]
    assert (place.state(job), place.jobs.get("default", job.id).attempt) == (State.QUEUED, 0)
    assert pauses == [10, 20]
    assert place.outages.read() == [WorkerOutage("w", ANY_BASE)]
    foreign = False
    assert worker.drain_queue() == 1
    assert place.state(job) is State.SUCCEEDED
    assert place.outages.read() == []


def test_a_base_that_this_worker_cannot_have_holds_up_no_other_job(place: Place) -> None:
    first = place.job(ROWS, n_epochs=1)
    other = first.spec.model_copy(update={"base": "other"})
    strange, good = place.jobs.create("default", other), place.job(ROWS, n_epochs=1)
    now, catalogue = 1000.0, place.catalogue
    place.bases = WarmBases(catalogue, place.artifacts, torch.device("cpu"), lambda: catalogue)
    worker = place.worker(retry_seconds=10, clock=lambda: now)
    assert worker.drain_queue() == 3
    assert (place.state(first), place.state(good)) == (State.SUCCEEDED, State.SUCCEEDED)
    passed_over = place.jobs.get("default", strange.id)
    assert (passed_over.state, passed_over.worker_failures) == (State.QUEUED, 0)
    assert any("has no base other" in line and "for 10 s" in line for line in place.messages(strange))
    assert place.outages.read() == [WorkerOutage("w", "other")]
    # It is left alone for as long as that.
    assert worker.drain_queue() == 0
    now += 11
    assert worker.drain_queue() == 1
    # The catalogue is read again.
    base = place.catalogue.bases[0]
    catalogue = Catalogue((base, base.model_copy(update={"id": "other", "aliases": ()})))
    now += 21
    assert worker.drain_queue() == 1
    assert place.state(strange) is State.SUCCEEDED
    assert place.outages.read() == []


def test_a_worker_that_cannot_say_that_it_is_out_of_service_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object) -> None:
        raise OperationalError("INSERT", None, Exception("no answer"))

    job = place.job(ROWS, n_epochs=1)
    FullDisk.failures = 1
    worker = place.worker(artifacts=FullDisk(place.artifacts.root))
    monkeypatch.setattr(place.outages, "begin", away)
    monkeypatch.setattr(place.outages, "end", away)
    assert worker.drain_queue() == 2
    assert place.state(job) is State.SUCCEEDED


def test_a_lost_device_gives_the_job_back_and_ends_the_worker(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = place.job(ROWS), place.job(ROWS)

    def illegal_access(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def no_answer(*_: object) -> bool:
        return False

    with monkeypatch.context() as broken:
        broken.setattr(loop, "finetune", illegal_access)
        broken.setattr(loop, "device_answers", no_answer)
        broken.setattr(place.bases, "discard", illegal_access)
        with pytest.raises(loop.DeviceLost):
            place.worker().drain_queue()
    assert place.state(first) is State.QUEUED
    assert any("illegal memory access" in line for line in place.messages(first))
    assert not any("Started" in line for line in place.messages(second))
    place.worker().drain_queue()
    assert place.state(first) is place.state(second) is State.SUCCEEDED


def test_an_error_that_spares_the_device_costs_one_attempt(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    job, calls = place.job(ROWS), []

    def once(*args: Any, **values: Any) -> Outcome:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA error: invalid argument")
        return finetune(*args, **values)

    monkeypatch.setattr(loop, "finetune", once)
    assert place.worker().drain_queue() == 2
    assert place.state(job) is State.SUCCEEDED


def test_who_lost_the_job_writes_nothing_more(place: Place) -> None:
    job = place.job(ROWS)

    def steal() -> bool:
        heartbeats = Heartbeats(place.jobs.database)
        return any(heartbeats.expire(beat) for beat in heartbeats.read() if beat.token == 1) and False

    place.worker(handover=steal).drain_queue()
    messages = place.messages(job)
    assert place.state(job) is State.SUCCEEDED
    assert sum("was lost" in line for line in messages) == 1
    assert sum("successfully completed" in line for line in messages) == 1


def fail_at_first(leases: Leases, method: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the server closes the connection: three times before COMMIT, or once after it."""
    real, left = getattr(leases, method), 3 if when == "before" else 1

    def failing(*args: object, **options: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            if when == "after":
                real(*args, **options)
            raise OperationalError("UPDATE", None, Exception("server closed the connection unexpectedly"))
        return real(*args, **options)

    monkeypatch.setattr(leases, method, failing)
    monkeypatch.setattr(retry, "RETRY_EVERY_SECONDS", 0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("method", "end"), [("fail", State.FAILED), ("succeed", State.SUCCEEDED), ("release", State.PAUSED)]
)
def test_a_job_ends_once_though_the_database_is_away_just_then(
    place: Place, monkeypatch: pytest.MonkeyPatch, method: str, end: State, when: str
) -> None:
    rows = [{"instruction": "long " * 200, "output": "cut off"}] if method == "fail" else ROWS
    job = place.job(rows, n_epochs=3, max_length=16 if method == "fail" else 512)
    claim = place.leases.claim

    def claim_and_pause(worker: str, **options: Any) -> Lease | None:
        lease = claim(worker, **options)
        if lease is not None and method == "release":
            place.jobs.pause("default", job.id)
        return lease

    monkeypatch.setattr(place.leases, "claim", claim_and_pause)
    fail_at_first(place.leases, method, when, monkeypatch)
    place.worker().drain_queue()
    assert place.state(job) is end
    assert place.jobs.get("default", job.id).worker_failures == 0
    again = place.job(ROWS, n_epochs=1)
    monkeypatch.undo()
    place.worker().drain_queue()
    assert place.state(again) is State.SUCCEEDED
