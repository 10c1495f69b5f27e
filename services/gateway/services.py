"""Everything one gateway process works with, opened and closed together."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

import httpx
from fastapi.concurrency import contextmanager_in_threadpool
from sqlalchemy import Connection

from services.gateway.background.garbage_collector import GarbageCollector
from services.gateway.background.notifier import Notifier
from services.gateway.background.prefetcher import Prefetcher
from services.gateway.background.reaper import Reaper
from services.gateway.bases.hub_access import HubAccess
from services.gateway.bases.metadata import BaseMetadataReader
from services.gateway.bases.tokenised import Tokenizers
from services.gateway.files.store import FileStore
from services.gateway.health import HealthCache
from services.gateway.http.idempotency import IdempotencyStore
from services.gateway.http.key_secret import own_secret
from services.gateway.http.keys import Keys
from services.gateway.http.small_pool import SmallPool
from services.gateway.inference.forwarder import Forwarder
from services.gateway.inference.prober import Prober
from services.gateway.inference.project_tags import ProjectTags
from services.gateway.inference.replicas import Replicas
from services.gateway.jobs.length_check import LengthCheck
from services.gateway.jobs.resolution import JobResolver
from services.gateway.jobs.sources import JobSources
from services.gateway.metrics import Metrics
from services.gateway.models.store import ModelStore
from services.gateway.responses.store import ResponseStore
from services.gateway.settings import GatewaySettings
from services.gateway.state_metrics import Sources, StateMetrics
from shared.adapters.store import AdapterStore
from shared.bases.catalogue import Catalogue
from shared.jobs.heartbeats import Heartbeats
from shared.jobs.notification import NotificationQueue
from shared.jobs.queue_state import QueueState
from shared.jobs.store import JobStore
from shared.jobs.worker_outages import WorkerOutages
from shared.jobs.workers import Workers
from shared.logs import get_logger
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database


@dataclass(frozen=True, slots=True)
class Services:
    """The parts, wired. Only the composition knows them all: endpoints ask for one by type (`routes.dependencies`)."""

    settings: GatewaySettings
    database: Database
    artifacts: LocalArtifactStore
    catalogue: Catalogue
    keys: Keys
    idempotency: IdempotencyStore
    files: FileStore
    jobs: JobStore
    bases: BaseMetadataReader
    hub: HubAccess
    sources: JobSources
    resolver: JobResolver
    tokenizers: Tokenizers
    notifications: NotificationQueue
    notifier: Notifier
    health: HealthCache
    models: ModelStore
    replicas: Replicas
    forwarder: Forwarder
    responses: ResponseStore
    metrics: Metrics
    small_pool: SmallPool


@asynccontextmanager
async def open_services(settings: GatewaySettings, catalogue: Catalogue, metrics: Metrics) -> AsyncIterator[Services]:
    """Build the parts, start the threads beside the requests, and stop and close everything at the end.

    Expects a migrated database (`check_schema`).

    Raises:
        TunesmithError: what lies at the key file is no key, or the keys in the database were made with another secret.
    """
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(inference_client(settings.inference_timeout))
        # In a thread: it reads files and SQL, and at the end waits for threads.
        opened = contextmanager_in_threadpool(_opened(settings, catalogue, metrics, client))
        services = await stack.enter_async_context(opened)
        if settings.inference_urls:
            prober = Prober(services.replicas)
            stack.push_async_callback(prober.stop)
            await prober.start()
            prefetcher = Prefetcher(services.database, services.replicas, metrics.prefetched)
            prefetcher.start()
            stack.push_async_callback(prefetcher.stop)
        yield services


@contextmanager
def _opened(
    settings: GatewaySettings, catalogue: Catalogue, metrics: Metrics, client: httpx.AsyncClient
) -> Iterator[Services]:
    with ExitStack() as stack:
        database = Database(settings.sql_url)
        stack.callback(database.close)
        notifications = NotificationQueue(settings.redis_url)
        stack.callback(notifications.close)
        worker_outages = WorkerOutages(database)
        artifacts = LocalArtifactStore(settings.artifacts_root, settings.reserve_bytes)
        bases, tokenizers = BaseMetadataReader(artifacts), Tokenizers(artifacts)
        files, jobs, adapters = FileStore(), JobStore(), AdapterStore()
        secret = own_secret(settings, database)
        models = ModelStore(catalogue, adapters)
        heartbeats = Heartbeats(database)
        replicas = Replicas(settings.inference_urls, client, settings.internal_token.get_secret_value())
        services = Services(
            settings=settings,
            database=database,
            artifacts=artifacts,
            catalogue=catalogue,
            keys=Keys(database, secret),
            idempotency=IdempotencyStore(),
            files=files,
            jobs=jobs,
            bases=bases,
            hub=HubAccess(catalogue, bases),
            sources=JobSources(files, jobs, adapters),
            resolver=JobResolver(catalogue, bases, LengthCheck(artifacts, tokenizers)),
            tokenizers=tokenizers,
            notifications=notifications,
            notifier=Notifier(notifications, heartbeats.queued),
            health=HealthCache(worker_outages, notifications),
            models=models,
            replicas=replicas,
            forwarder=Forwarder(database, models, replicas, ProjectTags(secret), settings.default_base),
            responses=ResponseStore(settings.keep_responses_seconds),
            metrics=metrics,
            small_pool=SmallPool(),
        )
        if services.keys.ensure_first(settings.key_path):
            get_logger("keys").info("first API key registered", file=str(settings.key_path))
        reaper = Reaper(heartbeats, services.notifier.notify, silence=settings.lease_seconds)
        collector = GarbageCollector(database, artifacts, _forget(settings, services), cache_bytes=settings.cache_bytes)
        metrics.registry.register(StateMetrics(_sources(services, worker_outages, reaper)))
        for background in (services.notifier, reaper, collector):
            background.start()
            stack.callback(background.stop)
        yield services


def _sources(services: Services, worker_outages: WorkerOutages, reaper: Reaper) -> Sources:
    """What metrics are asked for beside this process."""
    default = services.models.base(services.settings.default_base) if services.settings.default_base else None
    return Sources(
        queue=QueueState(services.database),
        workers=Workers(services.database),
        worker_outages=worker_outages,
        notifications=services.notifications,
        free_bytes=services.artifacts.free_bytes,
        reserve_bytes=services.settings.reserve_bytes,
        served=services.replicas.served,
        expected=[default.id] if default else [],
        lease_silence=lambda: reaper.longest_silence,
    )


def _forget(settings: GatewaySettings, services: Services) -> list[Callable[[Connection], object]]:
    """What drops rows that have been kept long enough."""
    days = settings.keep_events_days
    always: list[Callable[[Connection], object]] = [services.idempotency.forget, services.responses.forget]
    if days is None:
        return always
    return [*always, lambda tx: services.jobs.forget_events(tx, after_seconds=days * 86400)]


def inference_client(read_timeout: float) -> httpx.AsyncClient:
    """A client for long, silent answers; the system's proxy settings are not for processes next door."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(read_timeout, connect=5, write=30, pool=None),
        # Inference bounds its queue itself. Idle connections go long before its server closes them.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2),
        trust_env=False,
    )
