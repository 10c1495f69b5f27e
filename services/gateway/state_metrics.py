"""Prometheus metrics of what lies outside this process: database, queue, workers, disk, inference; asked when scraped.

What concerns jobs is read from SQL, so all gateways agree.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from shared.jobs.notification import NotificationQueue
from shared.jobs.queue_state import QueueState
from shared.jobs.spec import State
from shared.jobs.worker_outages import WorkerOutages
from shared.jobs.workers import Workers

PENDING = "tunesmith_notifications_pending"
# For dashboards that were made before 0.2; goes with the release after it.
OLD_PENDING = "tunesmith_doorbells_pending"


@dataclass(frozen=True, slots=True)
class Sources:
    """What is asked.

    Attributes:
        free_bytes: of the artifacts' disk.
        reserve_bytes: of it that are kept free.
        served: ids of the bases that are served now.
        expected: ids of those that should be.
        lease_silence: seconds for which the most silent worker has not renewed its lease.
    """

    queue: QueueState
    workers: Workers
    worker_outages: WorkerOutages
    notifications: NotificationQueue
    free_bytes: Callable[[], int]
    reserve_bytes: int
    served: Callable[[], Sequence[str]]
    expected: Iterable[str]
    lease_silence: Callable[[], float]


class StateMetrics(Collector):
    """Register it in a registry."""

    def __init__(self, sources: Sources) -> None:
        self._ask = sources
        self._lock = threading.Lock()
        # One that was served once and is not now is down, not unknown.
        self._bases = set(sources.expected)

    def describe(self) -> list[Metric]:
        # Registering must not ask SQL.
        return []

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("tunesmith_up", "Whether a part answers; of inference, whether a base is served")
        try:
            # All or nothing: half of it would be shown as if the rest were none.
            yield from list(self._jobs())
            up.add_sample("tunesmith_up", {"part": "database"}, 1)
        except SQLAlchemyError:
            up.add_sample("tunesmith_up", {"part": "database"}, 0)
        pending = self._ask.notifications.pending()
        up.add_sample("tunesmith_up", {"part": "redis"}, 0 if pending is None else 1)
        served = set(self._ask.served())
        with self._lock:
            self._bases |= served
            bases = sorted(self._bases)
        for base in bases:
            up.add_sample("tunesmith_up", {"part": "inference", "base": base}, int(base in served))
        yield up
        if pending is not None:
            yield GaugeMetricFamily(PENDING, "Notifications that no worker has taken yet", value=pending)
            yield GaugeMetricFamily(OLD_PENDING, f"Deprecated: {PENDING} under its old name", value=pending)
        yield GaugeMetricFamily(
            "tunesmith_lease_silence_seconds",
            "For how long the most silent worker with a job has not renewed its lease, as this gateway sees it",
            value=self._ask.lease_silence(),
        )
        yield from self._disk()

    def _jobs(self) -> Iterator[Metric]:
        queue = self._ask.queue.read()
        by_state = GaugeMetricFamily("tunesmith_jobs", "Jobs by state", labels=("state",))
        for state in State:
            by_state.add_metric([state], queue.jobs.get(state, 0))
        yield by_state
        failed = GaugeMetricFamily("tunesmith_jobs_failed", "Failed jobs by the code of their error", labels=("code",))
        for code, count in queue.failed.items():
            failed.add_metric([code], count)
        yield failed
        yield GaugeMetricFamily(
            "tunesmith_job_oldest_queued_seconds",
            "Age of the oldest job that waits for a worker; 0 if none does",
            value=queue.oldest_queued_seconds,
        )
        attempts = CounterMetricFamily(
            "tunesmith_job_attempts", "Attempts that ended before their job did, by reason", labels=("reason",)
        )
        for reason, count in queue.attempts.items():
            attempts.add_metric([reason], count)
        yield attempts
        yield GaugeMetricFamily(
            "tunesmith_training_tokens_per_second",
            "Real tokens per second of all jobs that train now",
            value=queue.tokens_per_second,
        )
        yield GaugeMetricFamily(
            "tunesmith_jobs_trained_tokens", "Tokens that the jobs which succeeded have trained on", value=queue.tokens
        )
        yield GaugeMetricFamily(
            "tunesmith_workers", "Training processes that are there, working or idle", value=self._ask.workers.count()
        )
        outages = GaugeMetricFamily(
            "tunesmith_worker_out_of_service",
            "1 for each worker that takes no job for now, or none of a base",
            labels=("worker", "base"),
        )
        for outage in self._ask.worker_outages.read():
            outages.add_metric([outage.worker, outage.base], 1)
        yield outages

    def _disk(self) -> Iterator[Metric]:
        try:
            free = self._ask.free_bytes()
        except OSError:
            # No figure is a figure, too: the alert rule on it asks whether it is absent.
            return
        yield GaugeMetricFamily("tunesmith_artifacts_free_bytes", "Free bytes of the artifacts' disk", value=free)
        yield GaugeMetricFamily(
            "tunesmith_artifacts_reserve_bytes",
            "Bytes of the artifacts' disk that uploads and checkpoints leave free",
            value=self._ask.reserve_bytes,
        )
