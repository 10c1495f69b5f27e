"""Watches that no SQL and no file call runs on a thread that runs an event loop: there it would stop every request."""

import asyncio
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

_FILE_CALLS = frozenset(
    {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.truncate"}
    | {"os.chmod", "os.utime", "shutil.rmtree", "sqlite3.connect", "fcntl.flock"}
)
# Of the watches that are on: the folder, and what was seen. Audit hooks cannot be taken away, so there is one.
_watching: list[tuple[str, list[str]]] = []
_installed = False


def on_event_loop() -> bool:
    """Whether the current thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextmanager
def blocking_calls(folder: Path) -> Iterator[list[str]]:
    """What event loops of this process do meanwhile that may block: any SQL, and file calls below `folder`."""
    global _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    seen: list[str] = []
    watch = (str(folder.resolve()), seen)
    _watching.append(watch)

    def sql(_: Any, __: Any, statement: str, *___: Any) -> None:
        if on_event_loop():
            seen.append(_described(statement))

    event.listen(Engine, "before_cursor_execute", sql)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", sql)
        _watching.remove(watch)


def _audit(name: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or name not in _FILE_CALLS or not on_event_loop():
        return
    for folder, seen in list(_watching):
        # A descriptor names no path; whoever has one has opened it.
        if any(isinstance(path, str | bytes | Path) and folder in _text(path) for path in arguments):
            seen.append(_described(f"{name} {arguments[0]}"))


def _text(path: str | bytes | Path) -> str:
    return path.decode("utf-8", "replace") if isinstance(path, bytes) else str(path)


def _described(what: str) -> str:
    return what + "\n" + "".join(traceback.format_stack(limit=12)[:-2])
