"""Ends what a killed supervisor leaves behind.

A supervisor that is SIGKILLed cannot stop its children. So it keeps a second small process and reports to it, over a
pipe, which process groups exist. When the supervisor ends, however it ends, the pipe closes: the guard then stops every
group that was not reported as gone. It inherits the stack's lock, so the stack counts as running until that is done.

Works on every POSIX system and reaches grandchildren, which Linux' PR_SET_PDEATHSIG does not.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Guard:
    """The supervisor's handle on its guard.

    Args:
        keep_open: file descriptors the guard inherits (the lock).
        remove: a file that must not outlive the supervisor (the connection file).
    """

    def __init__(self, keep_open: tuple[int, ...] = (), remove: Path | None = None) -> None:
        self._keep_open = keep_open
        self._arguments = [str(remove)] if remove else []
        self._watched: dict[int, float] = {}
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, leader: int, grace_seconds: float) -> None:
        self._watched[leader] = grace_seconds
        self._send(f"+{leader} {grace_seconds}")

    def forget(self, leader: int) -> None:
        self._watched.pop(leader, None)
        self._send(f"-{leader}")

    def renew_if_lost(self) -> None:
        """Start another guard if this one was killed."""
        if self._process.poll() is None:
            return
        self._close_pipe()
        self._process = self._start()
        for leader, grace_seconds in self._watched.items():
            self._send(f"+{leader} {grace_seconds}")

    def close(self) -> None:
        """End the guard; it first stops the groups it still watches."""
        self._close_pipe()
        self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        # By path and isolated: it must start fast, and whatever the supervisor's environment is.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__)), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=self._keep_open,
            start_new_session=True,
            text=True,
        )

    def _send(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        # The next tick replaces a guard that is gone, and sends everything again.
        with contextlib.suppress(BrokenPipeError):
            pipe.write(line + "\n")
            pipe.flush()

    def _close_pipe(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def main() -> None:
    watched: dict[int, float] = {}
    for line in sys.stdin:
        leader, _, grace_seconds = line[1:].partition(" ")
        if line.startswith("+"):
            watched[int(leader)] = float(grace_seconds)
        else:
            watched.pop(int(leader), None)
    for name in sys.argv[1:]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    _end(watched)


def _end(watched: dict[int, float]) -> None:
    for leader in watched:
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGTERM)
    started = time.monotonic()
    left = dict(watched)
    while left:
        for leader, grace_seconds in list(left.items()):
            if not _alive(leader) or time.monotonic() - started > grace_seconds:
                del left[leader]
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(leader, signal.SIGKILL)
        time.sleep(0.05)


def _alive(leader: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        os.kill(leader, 0)
        with open(f"/proc/{leader}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] != b"Z"
    except ProcessLookupError:
        return False
    except OSError:
        # There is no /proc here: the signal was delivered, so the process exists.
        return True


if __name__ == "__main__":
    main()
