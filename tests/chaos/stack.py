"""`tunesmith up` on the tiny base, and the ways it is hurt."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from redis import Redis

from services.gateway.background.reaper import LEASE_SECONDS
from shared.jobs.notification import NotificationQueue
from tests.cluster import SHORT_LEASES
from tests.deployment import Deployment
from tests.stack_processes import clean_environment, wait_until
from tests.tiny import write_catalogue, write_tiny_model
from tunesmith import connection as connections
from tunesmith.connection import Connection
from tunesmith.local_stack.stack import down, up


@dataclass
class Stack:
    """A supervised stack. What dies here is started again by nobody but its supervisor.

    Attributes:
        lease_seconds: how long a silent worker keeps its job.
        disk: the file system of its artifacts if it is one of their own, which a test may fill.
    """

    home: Path
    deployment: Deployment
    lease_seconds: float
    disk: Path | None = None

    @property
    def connection(self) -> Connection:
        return connections.read(self.home / "connection.json")

    def pid(self, name: str) -> int:
        return self.connection.pids[name]

    def trainer_child(self) -> psutil.Process:
        found: list[psutil.Process] = []

        def there() -> bool:
            with suppress(psutil.NoSuchProcess):
                found[:] = psutil.Process(self.pid("trainer")).children()
            return len(found) == 1

        wait_until(there, "the worker's child", logs=self.deployment.logs)
        return found[0]

    def kill(self, name: str) -> None:
        """SIGKILL one process, and wait until the supervisor has put another in its place."""
        before = self.pid(name)
        os.kill(before, signal.SIGKILL)
        self.wait_until_replaced(name, before)

    def wait_until_replaced(self, name: str, before: int) -> None:
        wait_until(lambda: self.pid(name) != before, f"another {name}", logs=self.deployment.logs)

    def kill_all_at_once(self, *names: str) -> None:
        """SIGKILL several, without waiting for anything."""
        for pid in [self.pid(name) for name in names]:
            os.kill(pid, signal.SIGKILL)

    def kill_gateway(self) -> None:
        self.kill("gateway")
        wait_until(self.deployment.works, "the gateway", logs=self.deployment.logs)

    def kill_inference(self) -> None:
        self.kill("inference")
        wait_until(self.deployment.works, "inference", logs=self.deployment.logs)

    def kill_redis(self) -> None:
        self.kill("redis")

    def kill_worker(self) -> None:
        self.kill("trainer")

    def kill_training_child(self) -> None:
        self.trainer_child().kill()

    def freeze_training_child(self) -> None:
        """It stands still for longer than its lease, and then wakes up as if nothing had been."""
        child = self.trainer_child()
        child.suspend()
        time.sleep(self.lease_seconds + 2)
        child.resume()

    def stop_worker(self) -> None:
        """SIGTERM, as at a deployment."""
        before = self.pid("trainer")
        os.kill(before, signal.SIGTERM)
        self.wait_until_replaced("trainer", before)

    def empty_redis(self) -> None:
        with Redis.from_url(self.connection.redis_url) as client:
            client.flushall()

    def notify_three_times(self) -> None:
        notifications = NotificationQueue(self.connection.redis_url)
        try:
            for _ in range(3):
                notifications.notify()
        finally:
            notifications.close()


FAULTS: dict[str, Callable[[Stack], None]] = {
    "training child killed": Stack.kill_training_child,
    "training child frozen": Stack.freeze_training_child,
    "worker killed": Stack.kill_worker,
    "worker told to stop": Stack.stop_worker,
    "gateway killed": Stack.kill_gateway,
    "inference killed": Stack.kill_inference,
    "redis killed": Stack.kill_redis,
    "redis emptied": Stack.empty_redis,
    "message delivered three times": Stack.notify_three_times,
}
COSTS_THE_LEASE = ("training child killed", "training child frozen", "worker killed")


@contextmanager
def running_stack(home: Path, leases: Mapping[str, str] = SHORT_LEASES, disk: Path | None = None) -> Iterator[Stack]:
    """A stack whose artifacts lie on `disk` if there is one; without `leases` they are as in production."""
    home.mkdir(parents=True, exist_ok=True)
    catalogue = write_catalogue(home / "catalogue.toml", write_tiny_model(home / "model"))
    environ = clean_environment() | {
        "TUNESMITH_CATALOGUE": str(catalogue),
        "TUNESMITH_ARTIFACTS": str(disk or home / "artifacts"),
        # A disk that a test fills is smaller than the reserve, and is to be filled to its last byte.
        **({"TUNESMITH_RESERVE_BYTES": "0"} if disk else {}),
        "TUNESMITH_WORKER_NAME": "worker-1",
        "TUNESMITH_THREADS": "1",
        "TUNESMITH_INFERENCE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        **leases,
    }
    with ExitStack() as stack:
        connection = up(home, port=0, base="tiny", environ=environ).connection
        stack.callback(down, home)
        url, key, database = connection.url, connection.api_key, connection.database_url
        deployment = Deployment(url, key, database, disk or home / "artifacts", lambda: tails(home / "logs"))
        stack.callback(deployment.close)
        yield Stack(home, deployment, float(leases.get("TUNESMITH_LEASE_SECONDS", LEASE_SECONDS)), disk)


def tails(folder: Path, characters: int = 3000) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-characters:]}" for log in sorted(folder.glob("*.log")))


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path | None]:
    """A file system of its own that can be filled; None where this user may not mount one."""
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=711", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            # What is still open on it, because the test was given up, goes with its process.
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder)


def fill(path: Path) -> None:
    """Take what is left of a file system."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def newest_state(stack: Stack, job: str) -> Path:
    """The private folder that the job would be resumed from."""
    checkpoint = stack.deployment.jobs.checkpoints("default", job).items[0]
    return stack.deployment.artifacts.checkpoint(job, checkpoint.lease_token, checkpoint.step)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


TEARS: dict[str, Callable[[Path], None]] = {"truncated": truncated, "flipped": flipped, "emptied": emptied}
TORN_FILES = ("state.safetensors", "state.json", "manifest.json")
