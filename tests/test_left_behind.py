"""However a run of tests ends, nothing that it started goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests import left_behind
from tests.stack_processes import ROOT, wait_until

# Starts a child known by its environment, and one that has none and is known by where it works; the second is nobody's.
RUN = """
import os, subprocess, sys, time
from pathlib import Path
from tests.left_behind import Watcher
own, other = map(Path, sys.argv[1:])
watcher = Watcher([own, other])
sleeping = [sys.executable, "-c", "import time; time.sleep(1000)"]
known = subprocess.Popen(sleeping, env=os.environ | {"TMPDIR": str(own)}, start_new_session=True)
nested = f"import subprocess; print(subprocess.Popen({sleeping!r}, start_new_session=True, stdout=-3).pid)"
orphan = subprocess.run([sys.executable, "-c", nested], env={}, cwd=other, stdout=-1, text=True, check=True).stdout
print(known.pid, int(orphan), flush=True)
if sys.stdin.readline() == "close\\n":
    print(len(watcher.close()), flush=True)
    known.wait()
"""


def started(own: Path, other: Path) -> tuple["subprocess.Popen[str]", list[psutil.Process]]:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(own), str(other)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout
    return run, [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]


def folders(root: Path) -> tuple[Path, Path]:
    own, other = root / "own", root / "other"
    for folder in (own, other):
        folder.mkdir()
    return own, other


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    own, other = folders(tmp_path)
    run, children = started(own, other)
    with run:
        assert len(children) == 2
        assert not any(map(gone, children))
        os.kill(run.pid, signal.SIGKILL)
        wait_until(lambda: all(map(gone, children)), "what it started to end")
        wait_until(lambda: not own.exists(), "its folder to be removed")
    assert other.exists()


def test_a_run_that_ends_by_itself_says_what_it_left(tmp_path: Path) -> None:
    run, children = started(*folders(tmp_path))
    with run:
        said, _ = run.communicate("close\n", timeout=60)
    assert said == "2\n"
    assert all(map(gone, children))


def test_what_belongs_to_others_is_left_alone(tmp_path: Path) -> None:
    own, other = folders(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=other) as foreign:
        assert left_behind.end([own]) == []
        assert foreign.poll() is None
        foreign.communicate(b"\n", timeout=60)
    assert foreign.returncode == 0
