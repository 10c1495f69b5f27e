"""Prometheus metrics of one gateway; what concerns jobs is read from SQL when it is scraped, so all gateways agree."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from shared.jobs.notification import NotificationQueue
from shared.jobs.spec import State
from shared.jobs.worker_outages import WorkerOutages
from shared.storage.database import Database
from shared.storage.tables import jobs

PENDING = "tunesmith_notifications_pending"
# For dashboards that were made before 0.2; goes with the release after it.
OLD_PENDING = "tunesmith_doorbells_pending"


class Metrics:
    """A registry of its own, so that several applications can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "tunesmith_gateway_requests_total", "Answers sent", ("method", "route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "tunesmith_gateway_request_seconds",
            "Time from request to the end of the answer",
            ("method", "route"),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            registry=self.registry,
        )
        self._prefetches = Counter(
            "tunesmith_gateway_prefetches_total",
            "New adapters that inference was told to load before the first request",
            ("outcome",),
            registry=self.registry,
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer; `RequestContext` has reduced the method to the known ones, so labels stay few."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def prefetched(self, outcome: str) -> None:
        self._prefetches.labels(outcome).inc()

    def watch(self, database: Database, notifications: NotificationQueue, worker_outages: WorkerOutages) -> None:
        """Add what is known outside this process."""
        self.registry.register(_Outside(database, notifications, worker_outages))


class _Outside(Collector):
    def __init__(self, database: Database, notifications: NotificationQueue, worker_outages: WorkerOutages) -> None:
        self._database = database
        self._notifications = notifications
        self._worker_outages = worker_outages

    def describe(self) -> list[Metric]:
        # Registering must not ask SQL.
        return []

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("tunesmith_up", "Whether a part answers", labels=("part",))
        try:
            yield self._jobs()
            yield self._outages()
            up.add_metric(["database"], 1)
        except SQLAlchemyError:
            up.add_metric(["database"], 0)
        pending = self._notifications.pending()
        up.add_metric(["redis"], 0 if pending is None else 1)
        yield up
        if pending is not None:
            yield GaugeMetricFamily(PENDING, "Notifications that no worker has taken yet", value=pending)
            yield GaugeMetricFamily(OLD_PENDING, f"Deprecated: {PENDING} under its old name", value=pending)

    def _jobs(self) -> Metric:
        counts: dict[str, int] = dict.fromkeys(State, 0)
        with self._database.read() as tx:
            for state, count in tx.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state)):
                counts[state] = count
        family = GaugeMetricFamily("tunesmith_jobs", "Jobs by state", labels=("state",))
        for state, count in counts.items():
            family.add_metric([state], count)
        return family

    def _outages(self) -> Metric:
        family = GaugeMetricFamily(
            "tunesmith_worker_out_of_service",
            "1 for each worker that takes no job for now, or none of a base",
            labels=("worker", "base"),
        )
        for outage in self._worker_outages.read():
            family.add_metric([outage.worker, outage.base], 1)
        return family
