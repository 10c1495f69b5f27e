"""Jobs on a stack that benchmarks start for themselves: created, and watched through the API and the system."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from examples.stdlib_docstrings import Row, write_rows
from tunesmith.client import Client
from tunesmith.local_stack import stack

BASE = "smollm2-135m-instruct"
POLL_SECONDS = 0.1
Json = dict[str, Any]
ENDED = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(slots=True)
class Watched:
    """One job as a client and the operating system saw it.

    Attributes:
        job: its last response.
        ended: epoch seconds at which it was seen to have ended.
        largest_mb: largest resident memory of the worker while the job ran, sampled from /proc, MB of 10^6 bytes.
        seen: (epoch seconds, response) whenever its step had changed.
    """

    job: Json = field(default_factory=dict)
    ended: float = 0.0
    largest_mb: float = 0.0
    seen: list[tuple[float, Json]] = field(default_factory=list)


class LiveStack:
    """A running stack and its worker's processes."""

    def __init__(self, client: Client, trainer: int, folder: Path) -> None:
        self.client = client
        self._trainer = trainer
        self._folder = folder

    def upload(self, name: str, rows: Sequence[Row]) -> str:
        """The id of a file with these rows."""
        path = self._folder / f"{name}.jsonl"
        write_rows(path, rows)
        file_id: str = self.client.upload(path)["id"]
        return file_id

    def run(self, body: Json, on_poll: Callable[[Json], None] = lambda _job: None) -> Watched:
        """Create a job and poll it until it ends.

        Raises:
            RuntimeError: it did not succeed.
        """
        watched = Watched()
        job_id = self.client.create_job(body)["id"]
        while watched.job.get("status") not in ENDED:
            time.sleep(POLL_SECONDS)
            watched.job = self.client.job(job_id)
            watched.ended = time.time()
            watched.largest_mb = max(watched.largest_mb, self._resident_mb())
            step = watched.job["progress"]["step"]
            if not watched.seen or watched.seen[-1][1]["progress"]["step"] != step:
                watched.seen.append((watched.ended, watched.job))
            on_poll(watched.job)
        if watched.job["status"] != "succeeded":
            raise RuntimeError(f"{job_id} {watched.job['status']}: {watched.job['error']}")
        return watched

    def event_data(self, job_id: str, key: str) -> Json:
        """The data of the newest event that holds `key`."""
        return next(e["data"] for e in self.client.events(job_id) if e["data"] and key in e["data"])

    def _resident_mb(self) -> float:
        """Of the largest process of the worker: the Celery parent holds no model."""
        return max(map(_resident_mb, [self._trainer, *_children(self._trainer)]))


@contextmanager
def live_stack(home: Path | None = None) -> Iterator[LiveStack]:
    """A stack that does nothing else, stopped at the end.

    Args:
        home: kept for the next run, with the converted base in it; a temporary folder if None.
    """
    with TemporaryDirectory(prefix="tunesmith-bench-") as scratch:
        place = home or Path(scratch) / "home"
        # A fixed precision: inference need not measure at its start.
        environ = dict(os.environ) | {"TUNESMITH_INFERENCE_PRECISION": "fp32"}
        started = stack.up(place, port=0, base=BASE, environ=environ)
        try:
            with Client(started.connection, timeout=300) as client:
                yield LiveStack(client, started.connection.pids["trainer"], Path(scratch))
        finally:
            if started.fresh:
                stack.down(place)


def _resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        return 0.0


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
