"""`python -m tunesmith.local_stack.supervisor LOCK_FD HOME < plan`: the process that keeps a stack alive.

Reads its plan from stdin, reports on stdout (JSON lines) how the start goes, and then runs until SIGTERM. It is
detached from the `tunesmith up` that started it.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from tunesmith.connection import Connection
from tunesmith.local_stack.guard import Guard
from tunesmith.local_stack.home import Home, record_supervisor
from tunesmith.local_stack.log_rotation import rotate
from tunesmith.local_stack.log_tail import log_tail
from tunesmith.local_stack.plan import Plan
from tunesmith.local_stack.processes import Child, ChildSpec, Supervisor

TICK_SECONDS = 0.1
ROTATE_EVERY_SECONDS = 60.0
SAY_EVERY_SECONDS = 15.0


class StartFailed(Exception):
    """A child died, or was not ready in time."""


class Stopped(Exception):
    """SIGTERM came while the stack was starting."""


def encode(plan: Plan) -> str:
    """A plan as the text `decode` reads."""
    children = [asdict(spec) | {"log": str(spec.log), "env": dict(spec.env)} for spec in plan.children]
    fields = {"children": children, "ready": dict(plan.ready), "connection": dict(plan.connection)}
    return json.dumps(fields | {"start_seconds": plan.start_seconds})


def decode(text: str) -> Plan:
    fields = json.loads(text)
    children = tuple(
        ChildSpec(**spec | {"log": Path(spec["log"]), "argv": tuple(spec["argv"])}) for spec in fields.pop("children")
    )
    return Plan(children=children, **fields)


class StackProcess:
    """One stack from start to stop."""

    def __init__(self, home: Home, plan: Plan, guard: Guard) -> None:
        self._home = home
        self._plan = plan
        self._supervisor = Supervisor(plan.children, guard, self._rewrite_connection)
        self._stopping = False

    def stop_soon(self, signum: int, frame: FrameType | None) -> None:
        self._stopping = True

    def run(self) -> int:
        """Start the stack, report, keep it running, stop it. Returns the exit status."""
        try:
            self._supervisor.start()
            self._wait_until_ready()
            self._write_connection(self._supervisor.pids())
            report({"event": "ready"})
            self._keep()
        except StartFailed as error:
            logging.error("start failed: %s", error)
            report({"event": "failed", "message": str(error)})
            return 1
        except Stopped:
            report({"event": "failed", "message": "stopped while starting"})
        finally:
            self._home.connection_file.unlink(missing_ok=True)
            self._supervisor.stop()
        return 0

    def _wait_until_ready(self) -> None:
        waiting = dict(self._plan.ready)
        started = said = time.monotonic()
        deadline = started + self._plan.start_seconds
        while waiting:
            if self._stopping:
                raise Stopped
            for child in self._supervisor.dead():
                raise StartFailed(exit_message(child))
            for name in [name for name, url in waiting.items() if responds(url)]:
                del waiting[name]
                report({"event": "child_ready", "name": name})
            if waiting and time.monotonic() > deadline:
                tails = "\n".join(tail(self._supervisor.children[name]) for name in waiting)
                raise StartFailed(f"not ready after {self._plan.start_seconds:g} s: {', '.join(waiting)}\n{tails}")
            if waiting and time.monotonic() - said > SAY_EVERY_SECONDS:
                said = time.monotonic()
                name = next(iter(waiting))
                child = self._supervisor.children[name]
                doing = log_tail(child.spec.log, child.log_start, lines=1).strip()
                seconds = round(said - started)
                report(
                    {"event": "waiting", "name": name, "seconds": seconds, "doing": "" if doing == "(empty)" else doing}
                )
            time.sleep(TICK_SECONDS)

    def _keep(self) -> None:
        rotated = time.monotonic()
        while not self._stopping:
            self._supervisor.tick()
            if time.monotonic() - rotated > ROTATE_EVERY_SECONDS:
                rotate(self._home.logs)
                rotated = time.monotonic()
            time.sleep(TICK_SECONDS)

    def _rewrite_connection(self, pids: Mapping[str, int]) -> None:
        try:
            self._write_connection(pids)
        except OSError as error:
            # A full disk must not end the stack; until the next change the file names a process that is gone.
            logging.error("%s could not be written: %s", self._home.connection_file, error)

    def _write_connection(self, pids: Mapping[str, int]) -> None:
        key_file = self._home.api_key_file
        # With a database that already has keys, the gateway makes no new one; then the caller names one.
        key = key_file.read_text().strip() if key_file.exists() else os.environ.get("TUNESMITH_API_KEY", "")
        connection = Connection(api_key=key, pids=dict(pids), **self._plan.connection)
        connection.write(self._home.connection_file)


def responds(url: str) -> bool:
    """Whether a GET gives 200."""
    try:
        # The environment's proxy settings are not meant for this machine's own ports.
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def exit_message(child: Child) -> str:
    status = child.reap()
    how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
    return f"{child.spec.name} ended with {how}\n{tail(child)}"


def tail(child: Child) -> str:
    return f"last lines of {child.spec.log}:\n{log_tail(child.spec.log, child.log_start)}"


def report(event: dict[str, Any]) -> None:
    """Write one line to the `tunesmith up` that started us, if it still reads."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def main() -> int:
    lock, root = int(sys.argv[1]), Path(sys.argv[2])
    home = Home(root)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    plan = decode(sys.stdin.read())
    if os.fork():
        # The child of `tunesmith up` ends here: the supervisor now belongs to init, and nobody has to wait for it.
        os._exit(0)
    guard = Guard(keep_open=(lock,), remove=home.connection_file)
    stack = StackProcess(home, plan, guard)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stack.stop_soon)
    record_supervisor(lock)
    report({"event": "started"})
    try:
        return stack.run()
    finally:
        guard.close()


if __name__ == "__main__":
    sys.exit(main())
