"""Child processes that are kept alive and stopped cleanly. Knows nothing of what they do.

Every child leads a process group of its own: the signal to stop goes to the leader (a Celery parent must be able to let
its child finish), and whatever of the group is left afterwards is killed.
"""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.local_stack.guard import Guard

FIRST_RESTART_SECONDS = 0.5
LAST_RESTART_SECONDS = 30.0
# A child that lived this long started well: its next death is not held against it.
STEADY_SECONDS = 60.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep.

    Attributes:
        env: set on top of the supervisor's own environment.
        log: stdout and stderr are appended here.
        grace_seconds: between SIGTERM and SIGKILL.
    """

    name: str
    argv: tuple[str, ...]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    grace_seconds: float = 10.0


class Child:
    """One process of a spec, now running."""

    def __init__(self, spec: ChildSpec, guard: Guard) -> None:
        self.spec = spec
        self._guard = guard
        self.log_start = spec.log.stat().st_size if spec.log.exists() else 0
        with spec.log.open("ab") as log:
            self._process = subprocess.Popen(
                spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.env},
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.started = time.monotonic()
        guard.watch(self.pid, spec.grace_seconds)

    def reap(self) -> int | None:
        """Clean up after a leader that has ended: kill the rest of its group, reap it, and tell the guard.

        Returns:
            The exit status (negative: the signal); None, and nothing is done, while the leader runs.
        """
        if self._process.returncode is None:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            # Before the leader is reaped its id cannot belong to anyone else.
            kill_group(self.pid)
            self._process.wait()
            self._guard.forget(self.pid)
        return self._process.returncode

    def stop(self) -> None:
        """SIGTERM to the leader; after the grace SIGKILL to the group."""
        if self.reap() is None:
            self._process.terminate()
        deadline = time.monotonic() + self.spec.grace_seconds
        while self.reap() is None:
            if time.monotonic() > deadline:
                logging.warning("%s did not stop within %g s: killed", self.spec.name, self.spec.grace_seconds)
                kill_group(self.pid)
                deadline = float("inf")
            time.sleep(POLL_SECONDS)


def kill_group(leader: int) -> None:
    # macOS says EPERM for a group of which only the unreaped leader is left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


class Supervisor:
    """Starts children in order, restarts those that die, and stops them in reverse order.

    Args:
        on_change: called with the process ids by name whenever one has changed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        guard: Guard,
        on_change: Callable[[dict[str, int]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._guard = guard
        self._on_change = on_change
        self._clock = clock
        self.children: dict[str, Child] = {}
        self._restart_at: dict[str, float] = {}
        self._delay: dict[str, float] = {}

    def start(self) -> None:
        for spec in self._specs.values():
            self._spawn(spec)

    def pids(self) -> dict[str, int]:
        return {name: child.pid for name, child in self.children.items()}

    def dead(self) -> list[Child]:
        """Children that have ended and were not replaced; reaps them."""
        return [child for child in self.children.values() if child.reap() is not None]

    def tick(self) -> None:
        """Check once: notice children that died, and restart those whose delay is over."""
        self._guard.renew_if_lost()
        for child in self.dead():
            if child.spec.name not in self._restart_at:
                logging.warning("%s died with status %s", child.spec.name, child.reap())
                self._schedule(child.spec.name, steady=time.monotonic() - child.started >= STEADY_SECONDS)
        due = [name for name, when in self._restart_at.items() if self._clock() >= when]
        for name in due:
            try:
                self._spawn(self._specs[name])
            except OSError as error:
                # No memory or no process left: the others go on, and this one is tried again.
                logging.error("%s could not be started: %s", name, error)
                self._schedule(name, steady=False)
            else:
                del self._restart_at[name]
        if due:
            self._on_change(self.pids())

    def stop(self) -> None:
        for child in reversed(self.children.values()):
            child.stop()
            logging.info("%s stopped", child.spec.name)

    def _spawn(self, spec: ChildSpec) -> None:
        child = Child(spec, self._guard)
        self.children[spec.name] = child
        logging.info("%s started, pid %d", spec.name, child.pid)

    def _schedule(self, name: str, *, steady: bool) -> None:
        delay = FIRST_RESTART_SECONDS if steady else self._delay.get(name, FIRST_RESTART_SECONDS)
        self._delay[name] = min(delay * 2, LAST_RESTART_SECONDS)
        self._restart_at[name] = self._clock() + delay
        logging.info("%s is restarted in %g s", name, delay)
