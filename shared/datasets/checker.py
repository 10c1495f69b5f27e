"""The check of a whole dataset while its bytes stream by, and reading again what was checked."""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from shared.datasets.examples import Example, Format, format_of, texts_of
from shared.datasets.forms import parse_row
from shared.datasets.reader import Row, RowError, RowReader
from shared.errors import InvalidDataset

MAX_REPORTED_ERRORS = 100
# Distinct rows are remembered as 64-bit digests; past this many, duplicates are no longer counted (bounded memory).
MAX_ROWS_COMPARED = 200_000
# So many names of unused keys are counted, and so many of them are told.
MAX_UNUSED_COUNTED = 1000
MAX_UNUSED_TOLD = 12
# The reference tutorial's advice; how much data is enough depends on the task, so these are warnings, never errors.
FEW_ROWS = 50
PROMPT_FIRST_ROWS = 100
HISTOGRAM_EDGES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(slots=True)
class DatasetReport:
    """What is known of a dataset's good rows; lengths are characters of all texts of a row.

    Attributes:
        skipped_rows: bad rows that are left out; none unless that was asked for.
        skipped: the first of them, each `{line, path, code, message}`.
        derived: how the rows that are learnt from were made, if they are not the file's own bytes.
    """

    format: Format = "instruction"
    rows: int = 0
    duplicates: int = 0
    length_histogram: list[dict[str, int | None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped_rows: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    derived: dict[str, Any] | None = None


class DatasetChecker:
    """Checks a dataset while its bytes stream by; feed it every chunk, then call `finish`.

    Args:
        skip_bad_rows: leave bad rows out, as long as the rows behind can be told from them.
        keep: given each good row as it was decoded; a RowError of its own makes a bad row of it.
    """

    def __init__(self, *, skip_bad_rows: bool = False, keep: Callable[[object], None] | None = None) -> None:
        self._reader = RowReader()
        self._skip = skip_bad_rows
        self._keep = keep
        self._errors: list[dict[str, Any]] = []
        self._error_count = 0
        self._format: Format | None = None
        self._rows = 0
        self._seen: set[bytes] = set()
        self._duplicates = 0
        self._counts = [0] * (len(HISTOGRAM_EDGES) + 1)
        self._unused: Counter[str] = Counter()

    @property
    def bad_rows(self) -> int:
        """How many were found so far."""
        return self._error_count

    def feed(self, chunk: bytes) -> None:
        """Check the rows completed by `chunk`.

        Raises:
            InvalidDataset: as soon as there are more errors than are reported, or reading cannot go on.
        """
        for row in self._reader.feed(chunk):
            self.take(row)
        if self._reader.ended and self._errors:
            raise self._invalid()

    def finish(self) -> DatasetReport:
        """The report on the whole file.

        Raises:
            InvalidDataset: any row is bad and none may be skipped, or there is no good one.
        """
        for row in self._reader.finish():
            self.take(row)
        if not self._rows and not self._errors:
            self._add_error(Row(1, error=RowError("", "empty", "the file has no rows")))
        if self._errors and not (self._skip and self._rows and not self._reader.ended):
            raise self._invalid()
        assert self._format is not None
        return DatasetReport(
            self._format,
            self._rows,
            self._duplicates,
            self._histogram(),
            self._warnings(),
            skipped_rows=self._error_count,
            skipped=self._errors,
        )

    def take(self, row: Row) -> None:
        """Check one row.

        Raises:
            InvalidDataset: there are more errors now than are reported.
        """
        unused: list[str] = []
        try:
            if row.error:
                raise row.error
            example = parse_row(row.value, unused.append)
            form = format_of(example)
            if self._format not in (None, form):
                raise RowError("", "mixed_forms", f"a {form} row in a file that began with {self._format} rows")
            if self._keep is not None:
                self._keep(row.value)
        except RowError as error:
            self._add_error(Row(row.line, error=error))
            return
        self._format = form
        self._rows += 1
        self._measure(example)
        for key in set(unused) if unused else ():
            if key in self._unused or len(self._unused) < MAX_UNUSED_COUNTED:
                self._unused[key] += 1

    def refuse(self, row: Row) -> NoReturn:
        """A row behind which nothing can be read: not even skipping helps. Raises InvalidDataset."""
        self._add_error(row)
        raise self._invalid()

    def _measure(self, example: Example) -> None:
        texts = texts_of(example)
        self._counts[bisect_left(HISTOGRAM_EDGES, sum(map(len, texts)))] += 1
        digest = hashlib.blake2b("\x00".join(texts).encode(), digest_size=8).digest()
        if digest in self._seen:
            self._duplicates += 1
        elif len(self._seen) < MAX_ROWS_COMPARED:
            self._seen.add(digest)

    def _add_error(self, row: Row) -> None:
        assert row.error is not None
        self._error_count += 1
        if len(self._errors) < MAX_REPORTED_ERRORS:
            error = row.error
            self._errors.append({"line": row.line, "path": error.path, "code": error.code, "message": error.message})
        elif not self._skip:
            raise self._invalid()

    def _invalid(self) -> InvalidDataset:
        first = self._errors[0]
        where = f"line {first['line']}" + (f", {first['path']}" if first["path"] else "")
        more = f" (and {self._error_count - 1} more)" if self._error_count > 1 else ""
        # Not where skipping would not help: no good row yet, or none behind can be read.
        skippable = self._rows and not self._skip and not self._reader.ended
        hint = "; on_bad_rows=skip leaves such rows out" if skippable else ""
        return InvalidDataset(f"{where}: {first['message']}{more}{hint}", self._errors, self._error_count)

    def _histogram(self) -> list[dict[str, int | None]]:
        edges: Iterable[int | None] = (*HISTOGRAM_EDGES, None)
        return [{"up_to": edge, "rows": rows} for edge, rows in zip(edges, self._counts, strict=True) if rows]

    def _warnings(self) -> list[str]:
        warnings = []
        if self._error_count:
            lines = ", ".join(str(error["line"]) for error in self._errors[:MAX_UNUSED_TOLD])
            more = ", …" if self._error_count > MAX_UNUSED_TOLD else ""
            warnings.append(f"{self._error_count} bad rows were skipped (lines {lines}{more})")
        if self._unused:
            told = [f"'{key[:40]}' ({rows} rows)" for key, rows in self._unused.most_common(MAX_UNUSED_TOLD)]
            more = f" and {len(self._unused) - len(told)} more" if len(self._unused) > len(told) else ""
            warnings.append(f"keys that are not learnt from: {', '.join(told)}{more}")
        warnings += row_advice(self._rows)
        if self._duplicates:
            warnings.append(f"{self._duplicates} rows are exact duplicates of others")
        return warnings


def row_advice(rows: int, whose: str = "this file has") -> list[str]:
    """What is to be said of so few rows; nothing of enough."""
    advice = []
    if rows < FEW_ROWS:
        advice.append(f"a model learns little from fewer than {FEW_ROWS} rows; {whose} {rows}")
    if rows < PROMPT_FIRST_ROWS:
        advice.append(
            f"with fewer than {PROMPT_FIRST_ROWS} rows, a better prompt may do as well as training: try that first"
        )
        advice.append("training teaches form and style; facts that change belong in retrieval, not in weights")
    return advice


def read_examples(path: Path) -> Iterator[Example]:
    """The examples of a file that was checked before.

    Raises:
        InvalidDataset: it was not, or has changed since.
    """
    reader = RowReader()
    with path.open("rb") as file:
        while chunk := file.read(1 << 16):
            yield from map(_example, reader.feed(chunk))
    yield from map(_example, reader.finish())


def _example(row: Row) -> Example:
    try:
        if row.error:
            raise row.error
        return parse_row(row.value)
    except RowError as error:
        entry = {"line": row.line, "path": error.path, "code": error.code, "message": error.message}
        raise InvalidDataset(f"line {row.line}: {error.message}", [entry], 1) from error
