"""The folder of one stack on this machine: names in it, and the lock that says whether the stack runs.

The lock is flock(2) on an open file. The supervisor and its guard hold it for as long as any process of the stack may
live, so a free lock means that nothing runs; no pid has to be trusted.
"""

import fcntl
import os
import time
from pathlib import Path

from tunesmith.connection import FILE_NAME


class Home:
    """Paths and lock of one stack; nothing is created before `acquire`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.connection_file = self.root / FILE_NAME
        self.api_key_file = self.root / "api_key"
        self.catalogue_file = self.root / "catalogue.toml"
        self._port_file = self.root / "port"
        self.logs = self.root / "logs"
        self.redis = self.root / "redis"
        self._lock_file = self.root / "stack.lock"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def remembered_port(self) -> int | None:
        """The gateway's port the last time that everything was up; None if it never was."""
        try:
            port = int(self._port_file.read_text())
        except (OSError, ValueError):
            return None
        return port if 0 < port < 65_536 else None

    def remember_port(self, port: int) -> None:
        """Clients know the stack by it: the next start takes it again."""
        self._port_file.write_text(f"{port}\n")

    def acquire(self) -> int | None:
        """Take the lock, creating the folder if needed.

        Returns:
            A file descriptor that holds the lock in every process that inherits it; None if another stack has it.
        """
        for folder in (self.root, self.logs, self.redis):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        return descriptor

    def is_running(self) -> bool:
        """Whether a stack of this folder runs, starts or stops."""
        try:
            descriptor = os.open(self._lock_file, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            # A shared lock: two processes that ask at once do not see each other.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def supervisor_pid(self) -> int | None:
        """The process to signal to stop; meaningful only while `is_running`."""
        try:
            return int(self._lock_file.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def wait_until_free(self, seconds: float) -> bool:
        """Whether the lock became free within the time."""
        deadline = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def record_supervisor(descriptor: int) -> None:
    """Write this process' id into the locked file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
