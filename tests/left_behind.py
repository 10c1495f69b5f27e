"""Finds and ends what a test run leaves behind, however it ends: also when pytest's own process is killed.

Whatever a test starts is known by its environment, whose TMPDIR is a folder of this run, or by working in a folder of
this run: PostgreSQL and Redis overwrite their environment, and work where their data lie.
"""

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

# A supervisor may start another child while its children are killed.
QUIET_ROUNDS = 3
LONGEST_SECONDS = 30.0


def processes_of(folders: Sequence[Path]) -> list[psutil.Process]:
    """Running processes that belong to these folders; this one, its watcher and Python's own trackers are none."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            command = " ".join(process.cmdline())
            if __name__ in command or __file__ in command or "multiprocessing." in command:
                continue
            if _belongs(process, folders):
                found.append(process)
    return found


def _belongs(process: psutil.Process, folders: Sequence[Path]) -> bool:
    with suppress(psutil.Error, OSError):
        if any(Path(process.cwd()).is_relative_to(folder) for folder in folders):
            return True
    return process.environ().get("TMPDIR") in {str(folder) for folder in folders}


def end(folders: Sequence[Path]) -> list[str]:
    """Kill all of them; returns what they were."""
    ended: dict[int, str] = {}
    quiet, deadline = 0, time.monotonic() + LONGEST_SECONDS
    while quiet < QUIET_ROUNDS and time.monotonic() < deadline:
        found = processes_of(folders)
        for process in found:
            with suppress(psutil.Error):
                ended[process.pid] = f"{process.pid}: {' '.join(process.cmdline())}"
                process.kill()
        quiet = 0 if found else quiet + 1
        if found or ended:
            time.sleep(0.1)
        else:
            break
    return list(ended.values())


class Watcher:
    """A process of its own that waits for the end of this one, and then ends what belongs to `folders`.

    The first folder is this run's alone and is removed as well.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [folder.resolve() for folder in folders]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, self.folders)], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
        )

    def close(self) -> list[str]:
        """End what is left and the watcher; returns what was left."""
        left = end(self.folders)
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(LONGEST_SECONDS)
        return left


def main() -> None:
    parent, folders = os.getppid(), [Path(folder) for folder in sys.argv[1:]]
    # A child that was forked may still hold the pipe: the parent's end is noticed either way.
    while os.getppid() == parent and not select.select([sys.stdin], [], [], 1.0)[0]:
        pass
    end(folders)
    shutil.rmtree(folders[0], ignore_errors=True)


if __name__ == "__main__":
    main()
