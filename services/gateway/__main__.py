"""`python -m services.gateway`: one gateway process. Expects a migrated database (`python -m shared.migrations`)."""

import sys

import uvicorn

from services.gateway.app import create_app
from services.gateway.background.periodic import Periodic
from services.gateway.http.client_timeouts import TimeoutProtocol
from services.gateway.http.key_secret import own_secret_at
from services.gateway.settings import GatewaySettings
from shared.bases.catalogue import load_catalogue
from shared.errors import TunesmithError, Unavailable
from shared.file_modes import keep_files_private
from shared.http.web import IDLE_CONNECTION_SECONDS
from shared.logs import configure_logging
from shared.settings import read_settings
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import check_schema
from shared.storage.installation_id import require_own_folder_at

GRACE_SECONDS = 10
SCHEMA_CHECK_SECONDS = 5.0


def main() -> None:
    settings = read_settings(GatewaySettings)
    configure_logging("gateway", settings.log_level)
    keep_files_private(settings.umask)
    try:
        # Here a fault is one sentence; when the application starts it would be a stack trace.
        catalogue = load_catalogue(settings.catalogue)
        check_schema(settings.sql_url)
        require_own_folder_at(settings.sql_url, LocalArtifactStore(settings.artifacts_root))
        own_secret_at(settings)
    except TunesmithError as error:
        sys.exit(error.message)
    except OSError as error:
        sys.exit(f"the artifacts folder {settings.artifacts_root}: {error}")
    config = uvicorn.Config(
        create_app(settings, catalogue),
        host=settings.host,
        port=settings.port,
        log_config=None,
        server_header=False,
        http=TimeoutProtocol,
        timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    sys.exit(serve(uvicorn.Server(config), settings.sql_url))


def serve(server: uvicorn.Server, database_url: str) -> str | int:
    """Serve until told to stop, or until a newer version migrates the database. Returns what to exit with."""
    outdated: list[str] = []

    def check() -> None:
        try:
            check_schema(database_url)
        except Unavailable:
            # Nobody can migrate what is away.
            return
        except TunesmithError as error:
            outdated.append(error.message)
            server.should_exit = True

    watch = Periodic("schema", check, SCHEMA_CHECK_SECONDS)
    watch.start()
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        watch.stop()
    if outdated:
        return outdated[0]
    return 0 if server.started else 1


if __name__ == "__main__":
    main()
