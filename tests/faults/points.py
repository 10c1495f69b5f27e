"""Every durable step of a database and of a folder, counted; at one of them, a fault.

The steps are the calls themselves (`Database.write`, os.mkdir, open, write, fsync, rename, unlink, …), wrapped from
outside: no production code knows of it. What a library writes without Python (safetensors) is one step.
"""

import builtins
import errno
import io
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from shared.storage.database import Database
from tests.faults.disk import Disk

# What a fault that stays breaks before somebody has mended it.
BROKEN_CALLS = 8
DATABASE_FAULTS = ("die", "away once", "away")
FOLDER_FAULTS = ("die", "power cut", "EIO once", "EIO", "ENOSPC once", "ENOSPC")
READING_FAULTS = ("EIO once", "EIO")
# Steps that need no free space.
SPACELESS = ("unlink", "rmdir", "fsync")


class Died(BaseException):
    """The process was killed: nothing that it has yet to do is done, clean-up included."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong at the n-th step, counted from 0; `step` is what kind of step that is."""

    at: int
    kind: str
    step: str


class Steps:
    """Counts the steps of what runs while it is installed.

    Attributes:
        names: of the steps so far, such as `rename files/file-1`.
        dead: whether the process was killed.
        power_cut: whether the whole machine was.
    """

    def __init__(self, disk: Disk, fault: Fault | None = None) -> None:
        self.names: list[str] = []
        self.dead = False
        self.power_cut = False
        self.disk = self._disk = disk
        self._fault = fault
        self._broken: str | None = None
        self._calls_left = 0
        self._lock = threading.RLock()

    def step(self, what: str, where: str = "") -> None:
        """One more. Raises what is to go wrong at it."""
        with self._lock:
            if self.dead:
                raise Died
            number = len(self.names)
            self.names.append(f"{what} {where}".strip())
            if self._fault is not None and number == self._fault.at:
                assert what == self._fault.step, f"step {number} is {what}, not {self._fault.step} as counted"
                self._strike(self._fault.kind, what)
            elif self._broken is not None and _is_of(what, self._broken):
                self._calls_left -= 1
                kind = self._broken
                if self._calls_left == 0:
                    self._broken = None
                raise _error(kind)

    def _strike(self, kind: str, what: str) -> None:
        if kind in ("die", "power cut"):
            self.dead, self.power_cut = True, kind == "power cut"
            raise Died
        if not kind.endswith(" once"):
            self._broken, self._calls_left = kind, BROKEN_CALLS
        raise _error(kind.removesuffix(" once"))

    def faults(self) -> list[Fault]:
        """Every fault of every step that was counted."""
        words = [name.split()[0] for name in self.names]
        return [Fault(at, kind, word) for at, word in enumerate(words) for kind in _faults_of(word)]

    # ------------------------------------------------------------------ the calls

    @contextmanager
    def installed(self) -> Iterator["Steps"]:
        """Count, and do harm, until the end of the block."""
        with pytest.MonkeyPatch.context() as patch:
            self._wrap_database(patch)
            for name in ("mkdir", "rmdir", "unlink", "remove"):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._wrapped_rename(getattr(os, name)))
            patch.setattr(os, "fsync", self._wrapped_fsync(os.fsync))
            opened = self._wrapped_open(io.open)
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            for module in ("checkpoint", "adapter"):
                where = f"services.trainer.recipe.{module}.save_file"
                patch.setattr(where, self._wrapped_save(_resolved(where)))
            yield self

    def _wrap_database(self, patch: pytest.MonkeyPatch) -> None:
        write = Database.write

        @contextmanager
        def counted(database: Database) -> Iterator[Connection]:
            self.step("BEGIN")
            with write(database) as tx:
                yield tx
                self.step("COMMIT")
            # The answer may be lost though it was done.
            self.step("COMMITTED")

        patch.setattr(Database, "write", counted)

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path as text if it lies in the folder that is watched."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.abspath(text)
        return text if text == self._disk.root or text.startswith(self._disk.root + os.sep) else None

    def _short(self, path: str) -> str:
        return path[len(self._disk.root) + 1 :]

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
            inside = self._inside(path, dir_fd)
            if inside is None:
                return call(path, *args, dir_fd=dir_fd, **kwargs)
            self.step("unlink" if name == "remove" else name, self._short(inside))
            copy = None
            if name in ("unlink", "remove") and os.path.isfile(inside):
                copy = self._disk.keep(inside)
            result = call(path, *args, dir_fd=dir_fd, **kwargs)
            if name == "mkdir":
                self._disk.made(inside)
            else:
                self._disk.removed(inside, copy)
            return result

        return counted

    def _wrapped_rename(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(source: Any, target: Any, **kwargs: Any) -> Any:
            before, after = self._inside(source), self._inside(target)
            if before is None or after is None:
                return call(source, target, **kwargs)
            self.step("rename", self._short(after))
            if os.path.isfile(after):
                self._disk.removed(after, self._disk.keep(after))
            result = call(source, target, **kwargs)
            self._disk.renamed(before, after)
            return result

        return counted

    def _wrapped_fsync(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def counted(descriptor: int) -> None:
            inside = self._inside(os.readlink(f"/proc/self/fd/{descriptor}"))
            if inside is None:
                return call(descriptor)
            self.step("fsync", self._short(inside))
            call(descriptor)
            return self._disk.synced(inside)

        return counted

    def _wrapped_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            inside = self._inside(path)
            if inside is None:
                return call(path, mode, *args, **kwargs)
            writes = bool(set(mode) & set("wax+"))
            fresh = writes and not os.path.exists(inside)
            self.step("open" if writes else "read", self._short(inside))
            file = call(path, mode, *args, **kwargs)
            if fresh:
                self._disk.made(inside)
            return _CountedFile(file, lambda: self.step("write", self._short(inside))) if writes else file

        return counted

    def _wrapped_save(self, call: Callable[..., None]) -> Callable[..., None]:
        def counted(tensors: Any, path: Path, *args: Any) -> None:
            self.step("save", self._short(str(path)))
            call(tensors, path, *args)
            self._disk.made(str(path))

        return counted


class _CountedFile:
    """A file whose writes are counted."""

    def __init__(self, file: Any, before_write: Callable[[], None]) -> None:
        self._file = file
        self._before_write = before_write

    def write(self, data: Any) -> Any:
        self._before_write()
        return self._file.write(data)

    def __enter__(self) -> "_CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _resolved(where: str) -> Any:
    module, _, name = where.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def _is_of(what: str, kind: str) -> bool:
    """Whether a step suffers from what is broken."""
    of_database = what in ("BEGIN", "COMMIT", "COMMITTED")
    if kind == "away":
        # What answers nothing lets nobody begin.
        return what == "BEGIN"
    if kind == "ENOSPC":
        return not of_database and what != "read" and what not in SPACELESS
    return not of_database


def _faults_of(what: str) -> tuple[str, ...]:
    if what in ("BEGIN", "COMMIT", "COMMITTED"):
        return (*DATABASE_FAULTS, "power cut")
    if what == "read":
        return READING_FAULTS
    if what in SPACELESS:
        return tuple(kind for kind in FOLDER_FAULTS if not kind.startswith("ENOSPC"))
    return FOLDER_FAULTS


def _error(kind: str) -> Exception:
    if kind == "away":
        cause = sqlite3.OperationalError("injected: the database is away")
        cause.sqlite_errorcode = sqlite3.SQLITE_BUSY
        return OperationalError("injected", {}, cause)
    number = getattr(errno, kind)
    return OSError(number, f"injected: {os.strerror(number)}")
