"""Everything one gateway process works with, opened and closed together."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx

from services.gateway.background.garbage_collector import GarbageCollector
from services.gateway.background.notifier import Notifier
from services.gateway.background.prefetcher import Prefetcher
from services.gateway.background.reaper import Reaper
from services.gateway.bases.facts import PreparedBases
from services.gateway.bases.tokenised import Tokenizers
from services.gateway.files.store import FileStore
from services.gateway.health import HealthCache
from services.gateway.http.idempotency import Answers
from services.gateway.http.keys import Keys, read_or_make_secret
from services.gateway.inference.prober import Prober
from services.gateway.inference.replicas import Replicas
from services.gateway.jobs.resolution import JobResolver
from services.gateway.metrics import Metrics
from services.gateway.models.store import ModelStore
from services.gateway.settings import GatewaySettings
from shared.bases.catalogue import Catalogue, load_catalogue
from shared.jobs.leases import Leases
from shared.jobs.notification import NotificationQueue
from shared.jobs.store import JobStore
from shared.logs import get_logger
from shared.storage.artifacts import ArtifactStore, LocalArtifactStore
from shared.storage.database import Database, check_schema


@dataclass(frozen=True, slots=True)
class Services:
    """The parts, wired."""

    settings: GatewaySettings
    database: Database
    artifacts: ArtifactStore
    catalogue: Catalogue
    keys: Keys
    answers: Answers
    files: FileStore
    jobs: JobStore
    bases: PreparedBases
    resolver: JobResolver
    tokenizers: Tokenizers
    leases: Leases
    notifications: NotificationQueue
    notifier: Notifier
    health: HealthCache
    models: ModelStore
    replicas: Replicas
    metrics: Metrics


@asynccontextmanager
async def open_services(settings: GatewaySettings, metrics: Metrics) -> AsyncIterator[Services]:
    """Build the parts, start the threads beside the requests, and stop and close everything at the end.

    Raises:
        TunesmithError: the schema is missing or old, or the catalogue cannot be read.
    """
    catalogue = load_catalogue(settings.catalogue)
    check_schema(settings.sql_url)
    async with AsyncExitStack() as stack:
        database = Database(settings.sql_url)
        stack.callback(database.close)
        notifications = NotificationQueue(settings.redis_url)
        stack.callback(notifications.close)
        client = await stack.enter_async_context(inference_client(settings.inference_timeout))
        metrics.watch(database, notifications)
        leases = Leases(database)
        artifacts = LocalArtifactStore(settings.artifacts_root)
        bases = PreparedBases(artifacts)
        services = Services(
            settings=settings,
            database=database,
            artifacts=artifacts,
            catalogue=catalogue,
            keys=Keys(database, _secret(settings)),
            answers=Answers(database),
            files=FileStore(database, artifacts),
            jobs=JobStore(database),
            bases=bases,
            resolver=JobResolver(catalogue, bases),
            tokenizers=Tokenizers(artifacts),
            leases=leases,
            notifications=notifications,
            notifier=Notifier(notifications),
            health=HealthCache(database, notifications),
            models=ModelStore(database, catalogue),
            replicas=Replicas(settings.inference_urls, client, settings.internal_token.get_secret_value()),
            metrics=metrics,
        )
        if services.keys.ensure_first(settings.key_path):
            get_logger("keys").info("first API key registered", file=str(settings.key_path))
        reaper = Reaper(leases, notifications, silence=settings.lease_seconds)
        for thread in (services.notifier, reaper, GarbageCollector(database, artifacts, services.answers.forget)):
            thread.start()
            stack.callback(thread.stop)
        if settings.inference_urls:
            prober = Prober(services.replicas)
            stack.push_async_callback(prober.stop)
            await prober.start()
            prefetcher = Prefetcher(database, services.replicas, metrics.prefetched)
            prefetcher.start()
            stack.push_async_callback(prefetcher.stop)
        yield services


def inference_client(read_timeout: float) -> httpx.AsyncClient:
    """A client for long, silent answers; the system's proxy settings are not for processes next door."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(read_timeout, connect=5, write=30, pool=None),
        # Inference bounds its queue itself. Idle connections go before its server closes them (uvicorn: after 5 s).
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2),
        trust_env=False,
    )


def _secret(settings: GatewaySettings) -> bytes:
    given = settings.key_secret.get_secret_value()
    return given.encode() if given else read_or_make_secret(settings.key_secret_path)
