"""Servers that several folders of tests use, tiers of tests, and how tests are divided among processes."""

import atexit
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi
import httpx
import hypothesis
import pytest
import structlog

from shared.processor import this_processor
from shared.torch_environment import COMPILER
from tests.left_behind import Watcher

if TYPE_CHECKING:
    from tests.cluster import Cluster

ROOT = Path(__file__).parent
# What asks for one of these starts a server that outlives the test.
SERVERS = {"postgres_url", "redis_server", "tiny_stack", "machine", "machine_of_all_tests"}
# Those that take longest come first, so that nobody waits for one at the end.
LONGEST_FIRST = (
    "test_journey.py",
    "test_fuzz.py",
    "test_compose.py",
    "services/trainer/worker/test_celery.py",
    "tunesmith/local_stack/test_stack.py",
    "tunesmith/local_stack/test_added_base.py",
    "upgrade",
    "test_serving_processes.py",
    "test_bad_input.py",
    "examples/test_demo.py",
    "contract",
    "services/trainer/recipe",
    "services/trainer/model",
    "services/inference/engine",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", metavar="SEED", help="run files, and the tests of each file, in a random order")


def pytest_configure() -> None:
    """A runner started in a shell's background ignores SIGINT, and so would every process that tests interrupt."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Cores are shared: threads of several processes that wait for each other cost more than they give.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Before torch is imported: without its compiler it comes in two seconds less, in each process.
    os.environ.update(COMPILER)
    if "SSL_CERT_FILE" not in os.environ:
        os.environ["SSL_CERT_FILE"] = str(_one_certificate())
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # With tracebacks as they are: in colour, with every variable, one takes seconds.
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(logger_factory=LogToStdout, processors=[*structlog.get_config()["processors"][:-1], plain])
    # Cores are shared: how long an example or an answer takes says nothing about the code. Clients that name no time of
    # their own wait for five seconds, which a first OpenAPI document on a busy machine has taken.
    default = httpx._config.DEFAULT_TIMEOUT_CONFIG
    default.connect = default.read = default.write = default.pool = 60.0
    hypothesis.settings.register_profile("shared cores", deadline=None, max_examples=50)
    hypothesis.settings.load_profile("shared cores")


def _one_certificate() -> Path:
    """A file of one root certificate: each client reads all it is given, and of all of them that takes 30 ms and more.

    No test speaks TLS.
    """
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    path = Path(tempfile.gettempdir()) / f"tunesmith-test-certificate-{os.getuid()}-{os.getpid()}.pem"
    path.write_text(first + end)
    atexit.register(path.unlink, missing_ok=True)
    return path


class LogToStdout:
    """Where structlog writes while no service has configured it.

    `print`, its default, uses sys.stdout without holding on to it: pytest puts another in its place while a server's
    thread writes, and CPython 3.11 then crashes (python/cpython#130163). Holding on to it is not enough: pytest closes
    it, and the write fails or reaches what was opened next under its number. The file descriptor is always there.
    """

    def __init__(self, *_: object) -> None:
        pass

    def msg(self, message: str) -> None:
        os.write(1, f"{message}\n".encode())

    log = debug = info = warn = warning = err = error = critical = exception = fatal = failure = msg


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts servers, and order the tests: the longest files first, or shuffled."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & SERVERS or item.path.is_relative_to(ROOT / "contract"):
            item.add_marker(pytest.mark.servers)
    if seed := config.getoption("--shuffle"):
        order = {item: random.Random(f"{seed} {item.nodeid}").random() for item in items}
        items.sort(key=lambda item: (random.Random(f"{seed} {item.path}").random(), order[item]))
    items.sort(key=_rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole files: their tests share fixtures.

    Under pytest 9.2 xdist 3.8 no longer sees its own `xdist_group` marks (pytest-xdist issue 1386), so that
    `--dist loadgroup` would tear files apart and start their servers once in each process.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByFile(config, log)


def group_of(nodeid: str) -> str:
    """What runs in one process: a file; the contract's files together."""
    place = nodeid.partition("::")[0]
    return "tests/contract" if place.startswith("tests/contract/") else place


def _rank(item: pytest.Item) -> int:
    place = str(item.path.relative_to(ROOT))
    return next((rank for rank, start in enumerate(LONGEST_FIRST) if place.startswith(start)), len(LONGEST_FIRST))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever tests have started is ended with the run, and a run that left something fails."""
    before = tmp_path_factory.getbasetemp()
    # PostgreSQL may run as another user, who must reach its folder.
    own = Path(tempfile.mkdtemp(prefix="tunesmith-tests-"))
    own.chmod(0o711)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TMPDIR", str(own))
        environment.setattr(tempfile, "tempdir", str(own))
        watcher = Watcher([own, before])
        yield
        left = watcher.close()
    assert left == []


def pytest_report_header() -> str:
    """Which processor's kernels this run tests; `make test-avx2` holds them to AVX2."""
    return f"processor: {this_processor()}"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server from PyPI's pgserver, stopped at the end."""
    from tests.stack_processes import running_postgres

    with running_postgres() as postgres:
        # No test pulls the plug, and every test makes a database: flushing them takes longer than the tests.
        postgres.set(fsync="off")
        yield postgres.uri


@pytest.fixture(scope="session")
def tiny_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    """Gateway and inference as processes on the tiny base."""
    from tests.cluster import tiny_stack

    with tiny_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running
