"""Servers that several folders of tests use; each is started once, at first need. And signals as they are expected."""

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psycopg
import pytest

from shared.processor import this_processor

if TYPE_CHECKING:
    from tests.cluster import Cluster


def pytest_configure() -> None:
    """A runner started in a shell's background ignores SIGINT, and so would every process that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Which processor's kernels this run tests; `make test-avx2` holds them to AVX2."""
    return f"processor: {this_processor()}"


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server from PyPI's pgserver, stopped at the end."""
    with pytest.MonkeyPatch.context() as environment:
        # pgserver keeps its lock file there, and platformdirs warns where no desktop has set it.
        environment.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        import pgserver

        server = pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
        url: str = server.get_uri()
        with psycopg.connect(url, autocommit=True) as connection:
            # No test pulls the plug, and every test makes a database: flushing them takes longer than the tests.
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        yield url
        server.cleanup()


@pytest.fixture(scope="session")
def tiny_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    """Gateway and inference as processes on the tiny base."""
    from tests.cluster import tiny_stack

    with tiny_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running
