"""The metrics of every inference process as one page: their own door has a token, which `tunesmith up` tells nobody."""

import asyncio
from collections.abc import Mapping

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from services.gateway.inference.replicas import Replicas


async def inference_metrics(replicas: Replicas) -> bytes:
    """Prometheus text: every series with the label `replica`, the process's number in `TUNESMITH_INFERENCE_URLS`.

    A process that does not answer is left out.
    """
    texts = await asyncio.gather(*(replicas.metrics(replica) for replica in replicas.all), return_exceptions=True)
    pages: dict[str, str] = {}
    for number, text in enumerate(texts):
        if isinstance(text, str):
            pages[str(number)] = text
        elif not isinstance(text, httpx.HTTPError | TimeoutError):
            raise text
    return await asyncio.to_thread(merged, pages)


def merged(pages: Mapping[str, str]) -> bytes:
    """Pages of Prometheus text by replica as one page.

    Raises:
        ValueError: one is no Prometheus text.
    """
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            target = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                target.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
