"""Prometheus metrics of one gateway process: what it has answered. What lies outside it is in `state_metrics`."""

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics


class Metrics:
    """A registry of its own, so that several applications can live in one process."""

    def __init__(self) -> None:
        # A time of birth for every series doubles the page, and tells nothing.
        disable_created_metrics()  # type: ignore[no-untyped-call]
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
