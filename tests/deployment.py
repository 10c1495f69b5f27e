"""A running stack as its client and its operator see it: requests over HTTP, the truth in SQL, the bytes on disk."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI, OpenAIError
from sqlalchemy import select

from shared.jobs.rows import Job
from shared.jobs.spec import State
from shared.storage.artifacts import LocalArtifactStore, sha256_of
from shared.storage.database import Database
from shared.storage.tables import adapters
from tests.jobs import Jobs
from tests.stack_processes import wait_until

# Long enough to be interrupted several times, with ten checkpoints.
LONG = {"n_epochs": 2, "batch_size": 1, "checkpoint_steps": 50}
SHORT = {"n_epochs": 1, "batch_size": 8}
LONGER = LONG | {"n_epochs": 4}
# To be cancelled: nobody waits for its end.
ENDLESS = LONG | {"n_epochs": 50}


def rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"What is {n}?", "output": f"It is the number {n * 7}."} for n in range(count)]


@dataclass
class Deployment:
    """One installation.

    Attributes:
        logs: what to show when something does not happen (the ends of the logs).
    """

    url: str
    api_key: str
    database_url: str
    artifacts_root: Path
    logs: Callable[[], str]
    file: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.openai = OpenAI(
            base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, _strict_response_validation=True
        )
        self.http = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {self.api_key}"}, timeout=60, trust_env=False
        )
        self.database = Database(self.database_url)
        self.jobs = Jobs(self.database)
        self.artifacts = LocalArtifactStore(self.artifacts_root)
        self._bytes: dict[str, str] = {}

    def close(self) -> None:
        self.openai.close()
        self.http.close()
        self.database.close()

    # ------------------------------------------------------------------ acting

    def upload(self, count: int = 250) -> str:
        data = "".join(json.dumps(row) + "\n" for row in rows(count)).encode()
        return self.openai.files.create(file=("rows.jsonl", data), purpose="fine-tune").id

    def create(self, hyperparameters: dict[str, Any], **more: Any) -> str:
        """An acknowledged job on the deployment's file."""
        self.file = self.file or self.upload()
        body = {"preset": "reference", "hyperparameters": hyperparameters, **more}
        return self.openai.fine_tuning.jobs.create(model="tiny", training_file=self.file, extra_body=body).id

    def generate(self, model: str | None) -> httpx.Response:
        parameters = {"max_new_tokens": 4, "adapter_id": model}
        return self.http.post("/generate", json={"instruction": "What is 3?", "parameters": parameters})

    # ------------------------------------------------------------------ looking

    def job(self, job: str) -> Job:
        return self.jobs.get("default", job)

    def messages(self, job: str) -> list[str]:
        """The messages a person reads, in order; metrics left out."""
        found = self.jobs.events("default", job, after=0, limit=100_000).items
        assert [event.number for event in found] == list(range(1, len(found) + 1))
        return [event.message for event in found if event.type == "message"]

    def steps(self, job: str) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        return [found.step for found in reversed(self.jobs.checkpoints("default", job, limit=1000).items)]

    def wait(self, true: Callable[[], object], what: str) -> None:
        wait_until(true, what, logs=self.logs)

    def wait_for_state(self, job: str, *states: State) -> float:
        """Returns the seconds it took."""
        started = time.monotonic()
        self.wait(lambda: self.job(job).state in states, f"{job} to be {', '.join(states)}: {self.messages(job)}")
        return time.monotonic() - started

    def wait_for_steps(self, job: str, more_than: int = 0) -> int:
        """Wait for a checkpoint later than a step; returns the newest one's step."""

        def newest() -> int:
            return (self.steps(job) or [0])[-1]

        self.wait(lambda: newest() > more_than, f"a checkpoint of {job} after step {more_than}")
        return newest()

    def works(self) -> bool:
        """Whether the gateway answers and can generate."""
        with suppress(httpx.HTTPError, OpenAIError):
            return self.generate(None).status_code == 200
        return False

    # ------------------------------------------------------------------ judging

    def uninterrupted(self, hyperparameters: dict[str, Any]) -> str:
        """The bytes (SHA-256) of a job that nothing happened to; trained on first use."""
        key = json.dumps(hyperparameters, sort_keys=True)
        if key not in self._bytes:
            self.measure_others_by(self.create(hyperparameters), hyperparameters)
        return self._bytes[key]

    def measure_others_by(self, job: str, hyperparameters: dict[str, Any]) -> None:
        """Take a job that is left alone as the uninterrupted run; waits for its end."""
        self.wait_for_state(job, State.SUCCEEDED, State.FAILED)
        assert self.job(job).attempt == 1, self.messages(job)
        self._bytes[json.dumps(hyperparameters, sort_keys=True)] = self.bytes_of(job)

    def bytes_of(self, job: str) -> str:
        adapter = self.job(job).adapter
        assert adapter is not None, self.messages(job)
        return sha256_of(self.artifacts.adapter(adapter) / "adapter_model.safetensors")

    def check_ended_once(self, job: str, hyperparameters: dict[str, Any]) -> list[str]:
        """A job that was interrupted is as one that was not. Returns its messages."""
        self.wait_for_state(job, State.SUCCEEDED, State.FAILED, State.CANCELLED)
        messages = self.messages(job)
        assert self.job(job).state is State.SUCCEEDED, (messages, self.logs())
        assert sum("successfully completed" in line for line in messages) == 1, messages
        assert self.bytes_of(job) == self.uninterrupted(hyperparameters)
        with self.database.read() as connection:
            c = adapters.c
            published = connection.execute(select(c.id, c.name).where(c.job == job, c.state == "published")).all()
        finals = [row.id for row in published if ":ckpt-step-" not in row.name]
        assert finals == [self.job(job).adapter]
        steps = self.steps(job)
        assert len(published) == len(steps) + 1
        assert steps == sorted(set(steps))
        return messages

    def check_nothing_half_written_is_visible(self) -> None:
        """Everything that is listed verifies, byte for byte, and can be served."""
        listed = [model for model in self.openai.models.list() if (model.model_extra or {})["kind"] != "base"]
        for model in listed:
            self.artifacts.verify(self.artifacts.adapter((model.model_extra or {})["adapter"]), "adapter")
        for model in listed[:5]:
            assert self.generate(model.id).status_code == 200, model

    def check_a_new_job_works(self) -> None:
        self.check_ended_once(self.create(SHORT), SHORT)
