"""This checkout's services as processes on the tiny base: one database, one folder, one Redis, as many as a test wants.

Each can be killed and started again by the test; all are stopped at the end. `tiny_stack` is the smallest whole one.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from shared.storage.database import migrate
from tests.deployment import Deployment
from tests.stack_processes import Processes, Running, answers, clean_environment, free_port, wait_until
from tests.tiny import prepared_tiny, write_catalogue
from tunesmith.local_stack.plan import CELERY_FLAGS

TOKEN = "between-us"
# A worker shows life every 0.3 s and is given up after 3 s.
SHORT_LEASES = {"TUNESMITH_RENEW_SECONDS": "0.3", "TUNESMITH_LEASE_SECONDS": "3"}


@dataclass
class Cluster:
    """What runs, and where.

    Attributes:
        url: of the gateway; `inference_urls` are private and want `TOKEN`.
        key: the first API key, once it is up.
        environment: what every process gets; `settings` are the test's own additions.
        positions: the longest sequence of the base, in tokens.
        trainers: workers by name.
    """

    folder: Path
    processes: Processes
    database_url: str
    inferences: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    positions: int = 512
    trainers: dict[str, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.artifacts, self.base, _ = prepared_tiny(self.folder, positions=self.positions)
        self.model = self.folder / "tiny-model"
        migrate(self.database_url)
        self.ports = {"gateway": free_port()}
        self.url = f"http://127.0.0.1:{self.ports['gateway']}"
        self.inference_urls = [f"http://127.0.0.1:{free_port()}" for _ in range(self.inferences)]
        self.environment = clean_environment() | {
            "TUNESMITH_HOME": str(self.folder),
            "TUNESMITH_DATABASE_URL": self.database_url,
            "TUNESMITH_CATALOGUE": str(write_catalogue(self.folder / "catalogue.toml", self.model)),
            "TUNESMITH_INTERNAL_TOKEN": TOKEN,
            "TUNESMITH_PORT": str(self.ports["gateway"]),
            "TUNESMITH_INFERENCE_URLS": ",".join(self.inference_urls),
            "TUNESMITH_THREADS": "1",
            "TUNESMITH_INFERENCE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **self.settings,
        }

    @property
    def inference_url(self) -> str:
        """Of the first inference process."""
        return self.inference_urls[0]

    def up(self, *trainers: str) -> None:
        """Start everything, with workers of these names, and wait until it works."""
        self.redis, redis_url = self.processes.start_redis()
        self.environment["TUNESMITH_REDIS_URL"] = redis_url
        self.inference = [self._start_inference(number) for number in range(self.inferences)]
        for name in trainers:
            self.start_trainer(name)
        self.gateway = self._python("gateway", ["services.gateway"])
        # The gateway looks for inference in the background: it is up before it knows of what is.
        for url in (*(f"{url}/health/ready" for url in self.inference_urls), f"{self.url}/health/ready?base=tiny"):
            wait_until(partial(answers, url), url, logs=self.processes.tails)
        self.key = (self.folder / "api_key").read_text().strip()

    def start_trainer(self, name: str) -> Running:
        module = ["celery", "-A", "services.trainer.worker", *CELERY_FLAGS]
        self.trainers[name] = self._python(name, module, {"TUNESMITH_WORKER_NAME": name})
        return self.trainers[name]

    @contextmanager
    def trainer(self) -> Iterator[None]:
        """A worker that takes what is queued, until the block ends."""
        worker = self.start_trainer("trainer")
        try:
            yield
        finally:
            worker.end()

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    @contextmanager
    def deployment(self) -> Iterator[Deployment]:
        """The cluster as its client and its operator see it."""
        seen = Deployment(self.url, self.key, self.database_url, self.folder / "artifacts", self.processes.tails)
        try:
            yield seen
        finally:
            seen.close()

    def _start_inference(self, number: int) -> Running:
        port = self.inference_urls[number].rpartition(":")[2]
        return self._python(f"inference-{number}", ["services.inference"], {"TUNESMITH_INFERENCE_PORT": port})

    def _python(self, name: str, module: list[str], more: Mapping[str, str] | None = None) -> Running:
        return self.processes.start(name, [sys.executable, "-m", *module], self.environment | dict(more or {}))


@contextmanager
def tiny_stack(folder: Path, *, positions: int = 512) -> Iterator[Cluster]:
    """Redis, one inference process and the gateway on SQLite; a trainer when the test wants one."""
    settings = {"TUNESMITH_DEFAULT_BASE": "tiny", "TUNESMITH_INFERENCE_SLOTS": "4"}
    settings["TUNESMITH_INFERENCE_CONTEXT"] = str(positions)
    # On a busy machine streams take longer than a deployment would wait for them.
    settings["TUNESMITH_INFERENCE_DRAIN_SECONDS"] = "300"
    with Processes(folder) as processes:
        cluster = Cluster(
            folder, processes, f"sqlite:///{folder / 'tunesmith.db'}", settings=settings, positions=positions
        )
        cluster.up()
        yield cluster
