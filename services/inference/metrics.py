"""Prometheus metrics: text-generation-inference's own names where it has them, ours (with units) for the rest."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.inference.generation import Generation
from services.inference.serving import Serving

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        # A time of birth for every series doubles the page, and tells nothing.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._count = Counter("tgi_request_count", "Generate requests that reached the engine.", registry=self.registry)
        self._success = Counter("tgi_request_success", "Generate requests that ended well.", registry=self.registry)
        self._failure = Counter(
            "tgi_request_failure", "Generate requests refused or failed.", ["err"], registry=self.registry
        )
        self._duration = self._histogram("tgi_request_duration", "Seconds from the body to the last token.", _SECONDS)
        self._queue = self._histogram("tgi_request_queue_duration", "Seconds in the engine's queue.", _SECONDS)
        self._first = self._histogram(
            "tgi_request_time_to_first_token", "Seconds from the body to the first token.", _SECONDS
        )
        self._validation = self._histogram(
            "tgi_request_validation_duration", "Seconds of checking, adapter load and tokenising.", _SECONDS
        )
        self._inference = self._histogram("tgi_request_inference_duration", "Seconds of prefill and decode.", _SECONDS)
        self._per_token = self._histogram(
            "tgi_request_mean_time_per_token_duration", "Seconds per generated token.", _TOKEN_SECONDS
        )
        self._generated = self._histogram("tgi_request_generated_tokens", "Tokens generated.", _TOKENS)
        self._input = self._histogram("tgi_request_input_length", "Prompt tokens.", _TOKENS)
        self._max_new = self._histogram("tgi_request_max_new_tokens", "Tokens allowed.", _TOKENS)
        self._load = self._histogram("tunesmith_adapter_load_seconds", "Seconds a request waited for a load.", _SECONDS)
        self._http = self._answers("tunesmith_inference_requests", "Answers by route template and status.")
        # Names of before 0.2, for dashboards; they go with the release after it.
        self._old_load = self._histogram(
            "tunesmith_adapter_load_duration",
            "Deprecated: tunesmith_adapter_load_seconds under its old name.",
            _SECONDS,
        )
        self._old_http = self._answers(
            "http_requests", "Deprecated: tunesmith_inference_requests_total under its old name."
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _answers(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["method", "route", "status"], registry=self.registry)

    def watch(self, serving: Serving) -> None:
        """Add the state of engine and adapters, read whenever metrics are."""
        self.registry.register(_State(serving))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        for counter in (self._http, self._old_http):
            counter.labels(method, route, str(status)).inc()

    def refused(self, code: str) -> None:
        self._failure.labels(code).inc()

    def finished(self, generation: Generation) -> None:
        """Count a request that generated to its end."""
        times, queue = generation.times, generation.queue_seconds
        inference = max(0.0, times.last_token - times.submitted - queue)
        self._count.inc()
        self._success.inc()
        self._duration.observe(times.last_token - times.received)
        self._first.observe(times.first_token - times.received)
        self._queue.observe(queue)
        self._validation.observe(times.submitted - times.received)
        self._inference.observe(inference)
        self._per_token.observe(inference / max(1, generation.generated))
        self._generated.observe(generation.generated)
        self._input.observe(generation.prompt_tokens)
        self._max_new.observe(sum(each.request.max_new_tokens for each in generation.candidates))
        if generation.adapter_load_ms is not None:
            for histogram in (self._load, self._old_load):
                histogram.observe(generation.adapter_load_ms / 1e3)


class _State(Collector):
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def collect(self) -> Iterator[Metric]:
        stats, adapters = self._serving.engine.stats(), self._serving.adapters
        gauges = {
            "tgi_queue_size": ("Requests waiting.", stats.waiting),
            "tunesmith_queue_tokens": ("Prompt tokens waiting.", stats.waiting_tokens),
            "tgi_batch_current_size": ("Sequences in the batch.", stats.running),
            "tgi_batch_current_max_tokens": ("Tokens reserved by the batch.", stats.batch_tokens),
            "tunesmith_adapters_resident": ("Adapters that hold a slot.", stats.adapters),
            "tunesmith_adapter_resident_bytes": ("Bytes of resident adapters.", adapters.used_bytes),
            "tunesmith_adapter_bytes_resident": (
                "Deprecated: tunesmith_adapter_resident_bytes under its old name.",
                adapters.used_bytes,
            ),
        }
        counters = {
            "tunesmith_adapter_loads": ("Adapters loaded.", adapters.loads),
            "tunesmith_adapter_load_failures": ("Adapters refused.", adapters.failed_loads),
            "tunesmith_adapter_evictions": ("Adapters evicted.", adapters.evictions),
            "tunesmith_engine_steps": ("Engine steps.", stats.steps),
            "tunesmith_engine_tokens": ("Tokens generated.", stats.tokens),
        }
        base = self._serving.base
        served = GaugeMetricFamily(
            "tunesmith_base", "The base served: always 1.", labels=["base", "revision", "precision", "runner"]
        )
        served.add_metric([base.id, base.revision, base.precision, base.runner], 1)
        yield served
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
