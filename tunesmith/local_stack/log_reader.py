"""Logs of a stack as people read them: one line an event with its local time, all services in one order, also live.

Knows the JSON lines that `shared.logs` writes and the plain ones that libraries print. Changes no file.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tunesmith.layout import printable

READ_BYTES = 1 << 20
POLL_SECONDS = 0.3
_OWN = ("timestamp", "level", "event", "service", "logger", "exception", "method", "path", "status", "ms")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of one log.

    Attributes:
        at: seconds since the epoch; that of the line before it where it says none (0 if there is none).
        fields: what it says as JSON; empty for a plain line.
    """

    log: str
    at: float
    text: str
    fields: dict[str, Any]

    @property
    def is_poll(self) -> bool:
        """Whether it tells of a question that was answered and changed nothing: clients that wait ask each second."""
        return (
            self.fields.get("event") == "request"
            and self.fields.get("method") == "GET"
            and self.fields.get("status") in (200, 304)
        )

    def readable(self, width: int) -> str:
        """The line for a person, its log's name padded to `width`; a traceback follows, indented."""
        when = datetime.fromtimestamp(self.at).strftime("%Y-%m-%d %H:%M:%S") if self.at else " " * 19
        head = f"{when}  {self.log:{width}}  "
        if not self.fields:
            return head + printable(self.text)
        fields = self.fields
        said = str(fields.get("event", ""))
        if said == "request" and "path" in fields:
            said = f"{fields.get('method')} {fields['path']} → {fields.get('status')} ({fields.get('ms')} ms)"
        rest = [f"{name}={value}" for name, value in fields.items() if name not in _OWN]
        trace = "".join(f"\n    {printable(line)}" for line in str(fields.get("exception") or "").splitlines())
        return head + printable(f"{fields.get('level', 'info'):7}  " + "  ".join([said, *rest])) + trace


def last_lines(logs: Sequence[Path], count: int, keep: Callable[[Line], bool] = lambda line: True) -> list[Line]:
    """The newest `count` lines to keep of all logs together, oldest first; of each the last MiB is looked at."""
    lines: list[Line] = []
    for log in logs:
        tail, _ = _read(log, max(0, _size(log) - READ_BYTES))
        lines += [line for line in _parsed(log.stem, tail, 0.0) if keep(line)]
    # The sort is stable: plain lines stay behind the one they follow.
    return sorted(lines, key=lambda line: line.at)[-count:] if count else []


def new_lines(logs: Callable[[], Sequence[Path]], poll: Callable[[float], None] = time.sleep) -> Iterator[Line]:
    """Lines as they are written from now on, for ever. A log that was cut (rotated) or has come is read from its start.

    Args:
        logs: which there are; asked again at each look.
        poll: waits between two looks, given seconds.
    """
    places = {log: _size(log) for log in logs()}
    at: dict[Path, float] = {}
    while True:
        for log in logs():
            start = places.get(log, 0)
            text, places[log] = _read(log, start if start <= _size(log) else 0, whole_lines=True)
            for line in _parsed(log.stem, text, at.get(log, time.time())):
                at[log] = line.at
                yield line
        poll(POLL_SECONDS)


def _read(log: Path, start: int, whole_lines: bool = False) -> tuple[str, int]:
    """The text from a byte on and where it ends; if so asked, without a last line that is still being written."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            data = file.read()
    except OSError:
        return "", start
    if whole_lines:
        data = data[: data.rfind(b"\n") + 1]
    return data.decode(errors="replace"), start + len(data)


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0


def _parsed(name: str, text: str, at: float) -> Iterator[Line]:
    for each in text.splitlines():
        if not each.strip():
            continue
        try:
            fields = json.loads(each)
            fields = fields if isinstance(fields, dict) and "event" in fields else {}
        except ValueError:
            fields = {}
        with contextlib.suppress(KeyError, TypeError, ValueError):
            at = datetime.fromisoformat(fields["timestamp"]).timestamp()
        yield Line(name, at, each, fields)
