"""Process entry: `python -m services.inference`. One process serves one base; SIGTERM drains and ends it."""

import logging
import os
import signal
import sys
from types import FrameType

import uvicorn

from services.inference.app import create_app
from services.inference.serving import Serving
from services.inference.settings import InferenceSettings
from shared.bases.catalogue import load_catalogue
from shared.errors import TunesmithError
from shared.file_modes import keep_files_private
from shared.http.web import IDLE_CONNECTION_SECONDS
from shared.logs import configure_logging, get_logger
from shared.settings import read_settings
from shared.storage.artifacts import LocalArtifactStore
from shared.torch_environment import prepare_for_torch


def main() -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    settings = read_settings(InferenceSettings)
    prepare_for_torch(os.environ)
    configure_logging("inference", settings.log_level)
    keep_files_private(settings.umask)
    log = get_logger("inference")

    def build() -> Serving:
        # torch and transformers take seconds to import; only a process that serves pays for it.
        from services.inference.build import build_serving
        from shared.bases.base_model import quiet_libraries

        quiet_libraries()
        try:
            store = LocalArtifactStore(settings.artifacts_root)
            check_installation(store, settings.installation)
            serving = build_serving(settings, store, load_catalogue(settings.catalogue))
        except TunesmithError as error:
            log.error("cannot serve", code=error.code, error=error.message)
            # uvicorn would add the traceback of an error that this line has explained.
            logging.getLogger("uvicorn.error").addFilter(_is_no_traceback)
            raise
        log.info("serving", base=serving.base.id, precision=serving.base.precision, port=settings.port)
        return serving

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, build),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_CONNECTION_SECONDS,
            # Requests in flight go on; new connections are refused meanwhile.
            timeout_graceful_shutdown=settings.drain_seconds,
        )
    )
    # uvicorn drains on the signal and then raises it again for the handler that was there before.
    signal.signal(signal.SIGTERM, _stop_on_request)
    server.run()
    return 0 if server.started else 1


def check_installation(store: LocalArtifactStore, expected: str) -> None:
    """Raises TunesmithError if another installation's artifacts folder is mounted than the settings expect, if any."""
    found = store.installation() if expected else None
    if expected and found != expected:
        raise TunesmithError(
            f"the artifacts folder {store.root} belongs to installation {found or '(none)'}, not to "
            f"TUNESMITH_INSTALLATION {expected}: is the right one mounted?",
            code="installation",
        )


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Traceback")


def _stop_on_request(signal_number: int, frame: FrameType | None) -> None:
    """Exit 0: stopping on request is no failure."""
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
