"""The real Celery worker as a process, on a real Redis-protocol server: notifications, shutdown, and sudden death."""

import base64
import hashlib
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from services.gateway.background.reaper import Reaper
from shared.jobs.heartbeats import Heartbeats
from shared.jobs.notification import NotificationQueue
from shared.jobs.rows import Job
from shared.jobs.spec import Hyperparameters, JobSpec, State
from shared.storage.artifacts import LocalArtifactStore, new_id, sha256_of
from shared.storage.database import Database, migrate
from shared.storage.tables import adapters
from tests.jobs import Jobs
from tests.stack_processes import WAIT_SECONDS, Processes, Running, clean_environment, wait_until
from tests.tiny import prepared_tiny, write_catalogue
from tunesmith.local_stack.plan import CELERY_FLAGS

pytestmark = pytest.mark.servers

ROWS = [{"instruction": f"What is {n}?", "output": f"It is the number {n * 7}."} for n in range(12)]


@dataclass
class Stack:
    """Redis, SQL and artifacts, and Celery workers as the test wants them."""

    home: Path
    artifacts: LocalArtifactStore
    revision: str
    redis_url: str
    environment: dict[str, str]
    database: Database
    processes: Processes
    worker: Running | None = None
    whole: str = ""

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.database)
        self.notifications = NotificationQueue(self.redis_url)
        # A shorter timeout than in production, but longer than several renewals.
        self.reaper = Reaper(Heartbeats(self.database), self.notify, silence=3)

    def notify(self) -> None:
        assert self.notifications.notify()

    def running_worker(self) -> Running:
        """One that takes jobs; every test finds it as the one before has left it, or a new one."""
        if self.worker is None:
            command = [sys.executable, "-m", "celery", "-A", "services.trainer.worker", *CELERY_FLAGS]
            self.worker = self.processes.start("worker", command, self.environment)
        elif not self.worker.alive():
            self.worker.restart()
        return self.worker

    def uninterrupted(self) -> str:
        """The hash of what `LONG` comes to undisturbed; trained once."""
        if not self.whole:
            job = self.create(**LONG)
            self.running_worker()
            wait_until(lambda: self.state(job).final, "an undisturbed job")
            assert self.state(job) is State.SUCCEEDED, self.processes.tails()
            self.whole = self.adapter_sha(job)
        return self.whole

    def create(self, **hyperparameters: object) -> Job:
        file_id = new_id("file")
        data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        with self.artifacts.staged() as staged:
            (staged / "data").write_bytes(data)
            self.artifacts.place(staged, self.artifacts.file(file_id))
        spec = JobSpec(
            base="tiny",
            base_revision=self.revision,
            training_file=file_id,
            training_sha256=hashlib.sha256(data).hexdigest(),
            hyperparameters=Hyperparameters.model_validate(hyperparameters),
        )
        job = self.jobs.create("default", spec)
        self.notifications.notify()
        return job

    def state(self, job: Job) -> State:
        return self.jobs.get("default", job.id).state

    def checkpointed(self, job: Job) -> bool:
        return bool(self.jobs.checkpoints("default", job.id).items)

    def adapter_sha(self, job: Job) -> str:
        adapter = self.jobs.get("default", job.id).adapter
        assert adapter is not None
        return sha256_of(self.artifacts.adapter(adapter) / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    tmp_path = tmp_path_factory.mktemp("celery")
    artifacts, base, _ = prepared_tiny(tmp_path)
    url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    migrate(url)
    with Processes(tmp_path) as processes, ExitStack() as closing:
        _, redis_url = processes.start_redis()
        environment = clean_environment() | {
            "TUNESMITH_HOME": str(tmp_path),
            "TUNESMITH_REDIS_URL": redis_url,
            "TUNESMITH_CATALOGUE": str(write_catalogue(tmp_path / "catalogue.toml", tmp_path / "tiny-model")),
            "TUNESMITH_RENEW_SECONDS": "0.3",
            "TUNESMITH_THREADS": "1",
        }
        database = Database(url)
        closing.callback(database.close)
        stack = Stack(tmp_path, artifacts, base.revision, redis_url, environment, database, processes)
        closing.callback(stack.notifications.close)
        yield stack


def trainer_child(worker: Running) -> psutil.Process:
    (child,) = psutil.Process(worker.pid).children()
    return child


LONG = {"n_epochs": 8, "batch_size": 1, "checkpoint_steps": 16}


def test_killed_in_mid_job_it_ends_once_with_the_bytes_of_an_uninterrupted_run(stack: Stack) -> None:
    worker, whole = stack.running_worker(), stack.uninterrupted()
    job = stack.create(**LONG)
    wait_until(lambda: stack.checkpointed(job), "the first checkpoint")
    child = trainer_child(worker)
    child.send_signal(signal.SIGKILL)
    assert stack.state(job) is State.RUNNING

    def ended() -> bool:
        stack.reaper.tick()
        return stack.state(job).final

    wait_until(ended, "the job to be trained again")
    done = stack.jobs.get("default", job.id)
    assert (done.state, done.attempt) == (State.SUCCEEDED, 2), stack.processes.tails()
    assert stack.adapter_sha(job) == whole
    messages = [event.message for event in stack.jobs.events("default", job.id, after=0, limit=1000).items]
    assert sum("was lost" in line for line in messages) == 1
    assert sum("successfully completed" in line for line in messages) == 1
    assert any("esum" in line and "step" in line for line in messages), messages
    # Nothing is doubled: one final adapter, one per checkpoint, and no private state.
    published = {c.adapter for c in stack.jobs.checkpoints("default", job.id, limit=100).items} | {done.adapter}
    owned = [
        folder.name
        for folder in (stack.artifacts.root / "adapters").iterdir()
        if stack.artifacts.verify(folder, "adapter").job == job.id
    ]
    assert published <= set(owned)
    with stack.database.read() as connection:
        servable = select(adapters.c.id).where(adapters.c.job == job.id, adapters.c.state == "published")
        finals = servable.where(adapters.c.name.not_like("%:ckpt-step-%"))
        assert connection.scalars(finals).all() == [done.adapter]
        assert set(connection.scalars(servable)) == published
    assert not stack.artifacts.checkpoints(job.id).exists()


def test_sigterm_saves_hands_over_and_ends_the_process(stack: Stack) -> None:
    worker, whole = stack.running_worker(), stack.uninterrupted()
    job = stack.create(**LONG)
    wait_until(lambda: stack.checkpointed(job), "the first checkpoint")
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(WAIT_SECONDS)
    handed_over = stack.jobs.get("default", job.id)
    assert (handed_over.state, handed_over.worker_failures) == (State.QUEUED, 0), stack.processes.tails()
    step = stack.jobs.checkpoints("default", job.id).items[0].step
    stack.running_worker()
    stack.notifications.notify()
    wait_until(lambda: stack.state(job).final, "the second worker to finish")
    assert stack.state(job) is State.SUCCEEDED
    assert stack.adapter_sha(job) == whole
    assert step > 0


def test_a_worker_is_notified_after_redis_was_emptied_and_three_notifications_are_one(stack: Stack) -> None:
    worker = stack.running_worker()
    first = stack.create(n_epochs=1)
    stack.notifications.notify()
    stack.notifications.notify()
    wait_until(lambda: stack.state(first).final, "the first job")
    stack.notifications._redis.flushall()
    second = stack.create(n_epochs=1)
    wait_until(lambda: stack.state(second).final, "the second job")
    assert [stack.state(first), stack.state(second)] == [State.SUCCEEDED] * 2
    assert stack.jobs.get("default", first.id).attempt == 1
    assert worker.alive()


def test_a_foreign_message_is_refused_and_the_worker_lives(stack: Stack) -> None:
    """A pickle pushed into Redis by hand must not be opened."""
    canary = stack.home / "canary"
    worker = stack.running_worker()
    pickled = f"cposix\nsystem\n(S'touch {canary}'\ntR."
    body = {
        "body": base64.b64encode(pickled.encode()).decode(),
        "content-type": "application/x-python-serialize",
        "content-encoding": "binary",
        "headers": {"lang": "py", "task": "tunesmith.ring", "id": "x", "argsrepr": "", "kwargsrepr": ""},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "tunesmith"},
            "delivery_tag": "x",
            "correlation_id": "x",
        },
    }
    stack.notifications._redis.lpush("tunesmith", json.dumps(body))
    job = stack.create(n_epochs=1)
    wait_until(lambda: stack.state(job).final, "the job behind the foreign message")
    assert stack.state(job) is State.SUCCEEDED
    assert worker.alive()
    assert not canary.exists()
