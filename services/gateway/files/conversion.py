"""Rows out of CSV and Parquet files, read by a process of its own that has limits of memory, time and rows."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from shared.datasets.checker import DatasetChecker
from shared.datasets.reader import MAX_ROW_BYTES, Row, RowError
from shared.errors import InvalidRequest, Overloaded

Kind = Literal["csv", "tsv", "parquet"]
PROGRAM = Path(__file__).with_name("tables.py")
SUFFIXES: dict[str, Kind] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
# Columns whose cells a table without lists holds as JSON text.
LISTS = ("messages", "conversations", "history", "prompt", "completion")
# Around a row: its line, and what makes one object of both.
ENVELOPE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process may take: bytes of address space, seconds, rows."""

    memory: int = 1 << 30
    seconds: int = 600
    rows: int = 10_000_000


AT_ONCE = 2
WAIT_SECONDS = 60.0
_slots = threading.BoundedSemaphore(AT_ONCE)


def table_kind(filename: str) -> Kind | None:
    """What kind of table a file name says it is; None for what is read as JSON."""
    return next((kind for suffix, kind in SUFFIXES.items() if filename.lower().endswith(suffix)), None)


def check_table(kind: Kind, file: Path, checker: DatasetChecker, limits: Limits | None = None) -> str:
    """Have every row of a table checked. Blocks for as long as that takes.

    Returns:
        How rows were made of it.

    Raises:
        InvalidDataset: see `DatasetChecker`.
        InvalidRequest: `table_limits`: it takes more memory or time than it may.
        Overloaded: too many tables are read already.
    """
    if not _slots.acquire(timeout=WAIT_SECONDS):
        raise Overloaded("too many tables are being read; try again in a moment", retry_after=10)
    try:
        return _check(kind, file, checker, limits or Limits())
    finally:
        _slots.release()


def _check(kind: Kind, file: Path, checker: DatasetChecker, limits: Limits) -> str:
    process = _started(kind, file, limits)
    killer = threading.Timer(limits.seconds, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        how = ""
        for line in _lines(process.stdout):
            if "columns" in line:
                how = _how(kind, line)
            elif "end" in line:
                return how
            elif "failed" in line:
                at, code, message = line["failed"]
                if code == "memory":
                    break
                checker.refuse(Row(at, error=_error(code, message)))
            else:
                checker.take(_row(line))
        # It ran out of memory, or was killed by another of its limits.
        raise InvalidRequest(
            f"the table cannot be read within {limits.memory >> 20} MiB of memory and {limits.seconds} s; write "
            "smaller row groups, or upload it as JSON Lines",
            param="file",
            code="table_limits",
        )
    finally:
        killer.cancel()
        process.kill()
        process.communicate()


def _started(kind: Kind, file: Path, limits: Limits) -> subprocess.Popen[bytes]:
    written = {"memory": limits.memory, "seconds": limits.seconds, "rows": limits.rows}
    written["row_bytes"] = MAX_ROW_BYTES + ENVELOPE_BYTES
    # None of the gateway's environment: there are secrets in it. Arrow's own allocators reserve address space.
    environment = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    return subprocess.Popen(
        [sys.executable, "-I", str(PROGRAM), kind, str(file), json.dumps(written)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
    )


def _lines(output: IO[bytes]) -> Iterator[dict[str, Any]]:
    while line := output.readline(MAX_ROW_BYTES + 1024):
        if not line.endswith(b"\n"):
            # It died in the middle of a line.
            return
        yield json.loads(line)


def _row(line: dict[str, Any]) -> Row:
    if "error" in line:
        return Row(line["line"], error=_error(*line["error"]))
    row = line["row"]
    for key in LISTS:
        if isinstance(text := row.get(key), str) and text.lstrip()[:1] == "[":
            try:
                row[key] = json.loads(text)
            except (ValueError, RecursionError):
                # Text that begins with a bracket; where a list is needed, it is refused as text.
                continue
    return Row(line["line"], row)


def _error(code: str, message: str) -> RowError:
    match code:
        case "wrong_cells":
            return RowError("", "wrong_cells", message)
        case "invalid_csv":
            return RowError("", "invalid_csv", message)
        case "invalid_parquet":
            return RowError("", "invalid_parquet", message)
        case "too_many_rows":
            return RowError("", "too_many_rows", message)
    # Those that rows of JSON may have too.
    return RowError("", code, message)


def _how(kind: Kind, line: dict[str, Any]) -> str:
    columns = f"{len(line['columns'])} columns"
    if kind == "parquet":
        return f"each row of {columns} became an object"
    divided = {",": "commas", ";": "semicolons", "\t": "tabs"}[line["delimiter"]]
    return f"each record below the header of {columns}, divided by {divided}, became an object"
