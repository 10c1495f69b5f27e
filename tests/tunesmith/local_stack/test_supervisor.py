"""Real small child processes: kept alive, stopped in order, and never left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tunesmith import connection as connections
from tunesmith.connection import NoConnection
from tunesmith.local_stack.home import Home
from tunesmith.local_stack.plan import CHECKOUT, Plan
from tunesmith.local_stack.processes import ChildSpec
from tunesmith.local_stack.supervisor import decode, encode

# Has a child of its own, as Celery has; both write their ids and wait. SIGTERM is noted before the leader leaves.
LEADER = """
import os, signal, sys, time
name, folder = sys.argv[1:3]
def note(line):
    with open(os.path.join(folder, name + ".txt"), "a") as file:
        file.write(line + chr(10))
def leave(*_):
    note("term %f" % time.monotonic())
    os._exit(0)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note("grandchild %d" % os.getpid())
    time.sleep(1000)
signal.signal(signal.SIGTERM, leave)
note("leader %d" % os.getpid())
while True:
    time.sleep(1000)
"""


class Stack:
    """A supervisor on two such children, started the way `tunesmith up` does it."""

    def __init__(self, root: Path, children: tuple[ChildSpec, ...]) -> None:
        self.home = Home(root)
        lock = self.home.acquire()
        assert lock is not None
        plan = Plan(children, ready={}, connection={"url": "http://127.0.0.1:1"}, start_seconds=120)
        with self.home.log("supervisor").open("ab") as log:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.local_stack.supervisor", str(lock), str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=CHECKOUT,
                pass_fds=(lock,),
                start_new_session=True,
                text=True,
            )
        os.close(lock)
        with self.launcher:
            assert self.launcher.stdin is not None
            assert self.launcher.stdout is not None
            self.launcher.stdin.write(encode(plan))
            self.launcher.stdin.close()
            self.events = []
            for line in self.launcher.stdout:
                self.events.append(json.loads(line))
                if self.events[-1]["event"] in ("ready", "failed"):
                    break

    @property
    def supervisor(self) -> int:
        pid = self.home.supervisor_pid()
        assert pid is not None
        return pid

    def pids(self) -> dict[str, int]:
        return connections.read(self.home.connection_file).pids

    def seen(self, name: str, kind: str) -> list[str]:
        """What the children of this name noted, oldest first."""
        path = self.home.root / f"{name}.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1] for line in lines if line.startswith(kind)]

    def everybody(self) -> list[int]:
        return [int(pid) for name in ("first", "second") for kind in ("l", "g") for pid in self.seen(name, kind)]


def leader(name: str, root: Path, grace_seconds: float = 10) -> ChildSpec:
    return ChildSpec(
        name, (sys.executable, "-c", LEADER, name, str(root)), root / f"logs/{name}.log", grace_seconds=grace_seconds
    )


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path, (leader("first", tmp_path), leader("second", tmp_path)))
    wait_for(lambda: all(stack.seen(name, kind) for name in ("first", "second") for kind in ("l", "g")))
    yield stack
    if stack.home.is_running():
        os.kill(stack.supervisor, signal.SIGTERM)
    assert stack.home.wait_until_free(120)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def living(pids: list[int]) -> list[int]:
    """Those that run; a zombie that this container's init has not reaped does not."""
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_stop_ends_children_in_reverse_order_and_their_children_too(stack: Stack) -> None:
    assert stack.events == [{"event": "started"}, {"event": "ready"}]
    assert len(living(stack.everybody())) == 4
    os.kill(stack.supervisor, signal.SIGTERM)
    assert stack.home.wait_until_free(120)
    assert living(stack.everybody()) == []
    assert float(stack.seen("second", "term")[0]) < float(stack.seen("first", "term")[0])
    with pytest.raises(NoConnection):
        stack.pids()


def test_dead_child_is_replaced_without_its_leftovers_and_the_connection_file_follows(stack: Stack) -> None:
    before = stack.pids()
    os.kill(before["second"], signal.SIGKILL)
    wait_for(lambda: len(stack.seen("second", "leader")) == 2 and stack.pids() != before)
    assert stack.pids()["second"] == int(stack.seen("second", "leader")[1])
    assert stack.pids()["first"] == before["first"]
    assert living([int(stack.seen("second", "grandchild")[0])]) == []


def test_killed_supervisor_leaves_nothing_and_its_lock_is_held_until_then(stack: Stack) -> None:
    os.kill(stack.supervisor, signal.SIGKILL)
    assert stack.home.is_running()
    assert stack.home.wait_until_free(120)
    assert living(stack.everybody()) == []
    # They were asked to stop, not only killed: a trainer writes its checkpoint here.
    assert stack.seen("first", "term")
    with pytest.raises(NoConnection):
        stack.pids()


def test_killed_guard_is_replaced_and_does_its_work(stack: Stack) -> None:
    guard = _guard_of(stack)
    os.kill(guard, signal.SIGKILL)
    wait_for(lambda: _guard_of(stack) not in (0, guard))
    # The new one must have read what it guards.
    time.sleep(1.5)
    os.kill(stack.supervisor, signal.SIGKILL)
    assert stack.home.wait_until_free(120)
    assert living(stack.everybody()) == []


def test_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    spec = ChildSpec("first", (sys.executable, "-c", deaf), tmp_path / "logs/first.log", grace_seconds=0.5)
    stack = Stack(tmp_path, (spec,))
    pids = stack.pids()
    os.kill(stack.supervisor, signal.SIGTERM)
    assert stack.home.wait_until_free(120)
    assert living(list(pids.values())) == []


def test_start_fails_with_the_log_of_the_child_that_died(tmp_path: Path) -> None:
    dying = ChildSpec("second", (sys.executable, "-c", "print('no disk'); raise SystemExit(3)"), tmp_path / "dying.log")
    home = Home(tmp_path)
    # `ready` names a URL that never answers, so that the start is still waiting when the child dies.
    plan = Plan((leader("first", tmp_path), dying), {"first": "http://127.0.0.1:9/"}, {"url": "http://127.0.0.1:9"})
    lock = home.acquire()
    assert lock is not None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith.local_stack.supervisor", str(lock), str(tmp_path)],
            input=encode(plan),
            capture_output=True,
            text=True,
            cwd=CHECKOUT,
            pass_fds=(lock,),
            timeout=120,
        )
    finally:
        os.close(lock)
    event = json.loads(done.stdout.splitlines()[-1])
    assert event["event"] == "failed"
    assert event["message"] == textwrap.dedent(
        f"""\
        second ended with status 3
        last lines of {tmp_path / "dying.log"}:
          no disk"""
    )
    assert home.wait_until_free(120)


def test_plan_survives_the_pipe(tmp_path: Path) -> None:
    plan = Plan((leader("first", tmp_path),), {"first": "http://127.0.0.1:9/"}, {"url": "http://127.0.0.1:9"})
    assert decode(encode(plan)) == plan


def _guard_of(stack: Stack) -> int:
    for process in psutil.Process(stack.supervisor).children():
        try:
            if process.cmdline()[-2:-1] and process.cmdline()[3].endswith("guard.py"):
                return process.pid
        except (IndexError, psutil.NoSuchProcess):
            continue
    return 0
