"""Everything one gateway process works with, opened and closed together."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from services.gateway.base_facts import PreparedBases
from services.gateway.file_store import FileStore
from services.gateway.job_resolution import JobResolver
from services.gateway.keys import Keys, read_or_make_secret
from services.gateway.reaper import Reaper
from services.gateway.ringer import Ringer
from services.gateway.settings import GatewaySettings
from services.gateway.sweeper import Sweeper
from shared.artifacts import ArtifactStore, LocalArtifactStore
from shared.catalogue import Catalogue, load_catalogue
from shared.database import Database, check_schema
from shared.doorbell import Doorbell
from shared.job_store import JobStore
from shared.leases import Leases
from shared.logs import get_logger


@dataclass(frozen=True, slots=True)
class Services:
    """The parts, wired."""

    settings: GatewaySettings
    database: Database
    artifacts: ArtifactStore
    catalogue: Catalogue
    keys: Keys
    files: FileStore
    jobs: JobStore
    resolver: JobResolver
    leases: Leases
    doorbell: Doorbell
    ringer: Ringer


@contextmanager
def open_services(settings: GatewaySettings) -> Iterator[Services]:
    """Build the parts, start the threads beside the requests, and stop and close everything at the end.

    Raises:
        TunesmithError: the schema is missing or old, or the catalogue cannot be read.
    """
    catalogue = load_catalogue(settings.catalogue)
    check_schema(settings.sql_url)
    with ExitStack() as stack:
        database = Database(settings.sql_url)
        stack.callback(database.close)
        doorbell = Doorbell(settings.redis_url)
        stack.callback(doorbell.close)
        leases = Leases(database)
        artifacts = LocalArtifactStore(settings.artifacts_root)
        services = Services(
            settings=settings,
            database=database,
            artifacts=artifacts,
            catalogue=catalogue,
            keys=Keys(database, _secret(settings)),
            files=FileStore(database, artifacts),
            jobs=JobStore(database),
            resolver=JobResolver(catalogue, PreparedBases(artifacts)),
            leases=leases,
            doorbell=doorbell,
            ringer=Ringer(doorbell),
        )
        if services.keys.ensure_first(settings.key_path):
            get_logger("keys").info("first API key registered", file=str(settings.key_path))
        for thread in (services.ringer, Reaper(leases, doorbell), Sweeper(database, artifacts)):
            thread.start()
            stack.callback(thread.stop)
        yield services


def _secret(settings: GatewaySettings) -> bytes:
    given = settings.key_secret.get_secret_value()
    return given.encode() if given else read_or_make_secret(settings.key_secret_path)
