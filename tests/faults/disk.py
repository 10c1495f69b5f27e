"""What a disk would keep in a power cut: only what was fsynced, and names only once their folder was.

A model, made of the calls that the code under test makes: names that were made, moved or removed since their folder's
fsync are undone in reverse, and a file whose bytes were not fsynced is empty. A real disk may keep more.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Pending:
    """One change of a name that no fsync has made durable.

    Attributes:
        before: where a renamed thing was, or a copy of what was removed; None for what was made.
    """

    kind: str
    path: str
    before: str | None = None


class Disk:
    """Watches a folder.

    Args:
        removed: an empty folder on the same file system, for what is removed and may come back.
    """

    def __init__(self, root: Path, removed: Path) -> None:
        self.root = str(root)
        self._removed = removed
        self._pending: list[Pending] = []
        self._copies = 0
        # What is there at the beginning is durable.
        self._synced = {self._bytes_of(path) for path in self._files()}

    def made(self, path: str) -> None:
        self._pending.append(Pending("made", path))

    def renamed(self, before: str, path: str) -> None:
        for entry in self._pending:
            entry.path = _moved(entry.path, before, path)
            if entry.kind == "renamed" and entry.before is not None:
                entry.before = _moved(entry.before, before, path)
        self._pending.append(Pending("renamed", path, before))

    def keep(self, path: str) -> str:
        """A copy of a file that is about to be removed."""
        self._copies += 1
        copy = self._removed / str(self._copies)
        os.link(path, copy)
        return str(copy)

    def removed(self, path: str, copy: str | None) -> None:
        self._pending.append(Pending("removed" if copy else "folder removed", path, copy))

    def synced(self, path: str) -> None:
        if os.path.isdir(path):
            self._pending = [entry for entry in self._pending if os.path.dirname(entry.path) != path]
        elif os.path.exists(path):
            self._synced.add(self._bytes_of(path))

    def cut(self) -> None:
        """Lose what was not durable."""
        for path in self._files():
            if self._bytes_of(path) not in self._synced:
                os.truncate(path, 0)
        for entry in reversed(self._pending):
            self._undo(entry)
        self._pending = []

    def _undo(self, entry: Pending) -> None:
        parent = os.path.dirname(entry.path)
        if entry.kind == "made":
            if os.path.isdir(entry.path):
                shutil.rmtree(entry.path)
            elif os.path.exists(entry.path):
                os.unlink(entry.path)
        elif not os.path.isdir(parent):
            # The folder itself is lost.
            return
        elif entry.kind == "renamed" and entry.before is not None:
            if os.path.exists(entry.path) and os.path.isdir(os.path.dirname(entry.before)):
                os.rename(entry.path, entry.before)
        elif entry.kind == "removed" and entry.before is not None:
            if not os.path.exists(entry.path):
                os.link(entry.before, entry.path)
        elif not os.path.exists(entry.path):
            os.mkdir(entry.path)

    def _files(self) -> Iterator[str]:
        for folder, _, names in os.walk(self.root):
            for name in names:
                yield os.path.join(folder, name)

    @staticmethod
    def _bytes_of(path: str) -> tuple[int, int, int]:
        """Equal only for the same file with the same bytes, as far as its times tell."""
        found = os.stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns


def _moved(path: str, before: str, after: str) -> str:
    return after + path[len(before) :] if path == before or path.startswith(before + os.sep) else path
