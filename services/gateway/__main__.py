"""`python -m services.gateway`: one gateway process. Expects a migrated database (`python -m shared.migrations`)."""

import sys

import uvicorn

from services.gateway.app import create_app
from services.gateway.http.client_timeouts import TimeoutProtocol
from services.gateway.settings import GatewaySettings
from shared.bases.catalogue import load_catalogue
from shared.errors import TunesmithError
from shared.logs import configure_logging
from shared.storage.database import check_schema

GRACE_SECONDS = 10


def main() -> None:
    settings = GatewaySettings()
    configure_logging("gateway", settings.log_level)
    try:
        # Here a fault is one sentence; when the application starts it would be a stack trace.
        catalogue = load_catalogue(settings.catalogue)
        check_schema(settings.sql_url)
    except TunesmithError as error:
        sys.exit(error.message)
    uvicorn.run(
        create_app(settings, catalogue),
        host=settings.host,
        port=settings.port,
        log_config=None,
        server_header=False,
        http=TimeoutProtocol,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
