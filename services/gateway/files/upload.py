"""Receiving a dataset: multipart bytes to a staged file, every row checked and hashed as it passes.

Owns the limits of a multipart body. Knows no HTTP framework, no SQL; memory is bounded by one chunk and one row.
"""

import contextlib
import hashlib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from services.gateway.files.conversion import Kind, check_table, table_kind
from services.gateway.files.derived import DerivedRows
from services.gateway.files.store import NewFile
from shared.datasets.checker import DatasetChecker, DatasetReport
from shared.errors import InvalidRequest, PayloadTooLarge
from shared.storage.artifacts import DATA, LocalArtifactStore

MAX_PARTS = 8
MAX_FIELD_BYTES = 1024
MAX_PART_HEADER_BYTES = 4096
MAX_PART_HEADERS = 8
# Boundaries, part headers and fields around the file itself.
MAX_FORM_OVERHEAD = 64 << 10
PURPOSE = "fine-tune"
ON_BAD_ROWS = ("refuse", "skip")
NOT_DATASETS = (".arrow", ".feather", ".xls", ".xlsx", ".zip", ".gz", ".tar", ".tgz", ".bz2", ".xz", ".7z")


@contextlib.contextmanager
def receiving(artifacts: LocalArtifactStore, content_type: str, max_bytes: int) -> Iterator["DatasetUpload"]:
    """An upload into a staged folder, which goes at the end unless it was placed.

    Raises:
        InvalidRequest: see `DatasetUpload`.
    """
    with artifacts.staged() as folder:
        upload = DatasetUpload(content_type, folder, max_bytes, artifacts.require_space)
        with contextlib.closing(upload):
            yield upload


class DatasetUpload:
    """Takes the body of `POST /v1/files` chunk by chunk.

    Args:
        content_type: the request's header.
        folder: an empty staged folder; the file is written to `folder/data`.
        max_bytes: size of the file, and of the rows derived from it.
        require_space: raises OSError if the disk is full.

    Raises:
        InvalidRequest: the content type is not multipart/form-data with a boundary.
    """

    def __init__(
        self, content_type: str, folder: Path, max_bytes: int, require_space: Callable[[], None] = lambda: None
    ) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise InvalidRequest("send multipart/form-data with the parts 'purpose' and 'file'", code="not_multipart")
        callbacks: dict[str, Callable[..., Any]] = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                callbacks,
                max_header_count=MAX_PART_HEADERS,
                max_header_size=MAX_PART_HEADER_BYTES,
            )
        except FormParserError as error:
            raise InvalidRequest(f"malformed multipart body: {error}", code="not_multipart") from error
        self.folder = folder
        self._file = (folder / DATA).open("wb")
        self._max_bytes = max_bytes
        self._require_space = require_space
        self._checker = DatasetChecker()
        self._derived: DerivedRows | None = None
        self._table: Kind | None = None
        self._sha256 = hashlib.sha256()
        self._received = self._size = self._parts = 0
        self._header_name, self._header_value = bytearray(), bytearray()
        self._disposition = b""
        self._part = ""
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._complete = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            InvalidRequest: the form is malformed, or has a part that is not expected.
            InvalidDataset: the rows cannot be right any more.
            PayloadTooLarge: a limit is passed.
        """
        self._received += len(chunk)
        if self._received > self._max_bytes + MAX_FORM_OVERHEAD:
            raise self._too_large()
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest(f"malformed multipart body: {error}", code="not_multipart") from error

    def finish(self) -> NewFile:
        """The whole body was fed.

        Raises:
            InvalidRequest: a part is missing, the body ended early, or the purpose is not ours.
            InvalidDataset: a row is bad, or there is none.
            PayloadTooLarge: so many rows come out of it.
            Overloaded: see `check_table`.
        """
        self._file.close()
        if not self._complete:
            raise InvalidRequest("the multipart body ends before its last boundary", code="not_multipart")
        if self._filename is None:
            raise InvalidRequest("the part 'file' is missing", param="file")
        if "purpose" not in self._fields:
            raise InvalidRequest("the part 'purpose' is missing; send 'fine-tune'", param="purpose")
        self._check_purpose()
        report = self._report()
        return NewFile(self._filename, PURPOSE, self._size, self._sha256.hexdigest(), report, self._on_bad_rows)

    def close(self) -> None:
        self._file.close()
        if self._derived is not None:
            self._derived.close()

    def _report(self) -> DatasetReport:
        how = "" if self._table is None else check_table(self._table, self.folder / DATA, self._checker)
        report = self._checker.finish()
        if self._derived is None:
            return report
        if self._table is None and not report.skipped_rows:
            self._derived.discard()
            return report
        self._derived.finish()
        left_out = "bad rows were left out" if report.skipped_rows else ""
        derived = {
            "made_from": self._table or "json",
            "how": "; ".join(filter(None, [how, left_out])),
            "bytes": self._derived.size,
            "sha256": self._derived.sha256,
        }
        return replace(report, derived=derived)

    @property
    def _on_bad_rows(self) -> str:
        return bytes(self._fields.get("on_bad_rows", b"")).decode("utf-8", "replace") or "refuse"

    def _on_part_begin(self) -> None:
        if self._part == "purpose":
            # Known before the file, as OpenAI's client sends it, it is checked before the file.
            self._check_purpose()
        if self._part == "on_bad_rows":
            self._check_on_bad_rows()
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"more than {MAX_PARTS} parts", code="not_multipart")
        self._part, self._disposition = "", b""

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name, self._header_value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name.startswith("expires_after"):
            # A file that stays although it was to go is not what was asked for.
            raise InvalidRequest("files do not expire: delete it when it is no longer needed", param="expires_after")
        if name not in ("file", "purpose", "on_bad_rows"):
            shown = name if name.isprintable() and name.isascii() else "?"
            raise InvalidRequest(
                f"unknown part '{shown[:64]}'; expected 'purpose', 'file' and perhaps 'on_bad_rows'",
                param=shown[:64],
                code="unknown_field",
            )
        if name in self._fields or (name == "file" and self._filename is not None):
            raise InvalidRequest(f"the part '{name}' comes twice", param=name)
        if name == "file":
            self._filename = safe_filename(options.get(b"filename", b"").decode("utf-8", "replace"))
            if self._filename.lower().endswith(NOT_DATASETS):
                raise InvalidRequest(
                    f"{self._filename}: not accepted; send JSON Lines, one object per line, or one JSON array, CSV or "
                    "Parquet",
                    param="file",
                    code="unsupported_file_type",
                )
            self._begin_rows(self._filename)
        elif name == "on_bad_rows" and self._filename is not None:
            # The rows are checked as they come.
            raise InvalidRequest("send the part 'on_bad_rows' before the file", param=name)
        else:
            self._fields[name] = bytearray()
        self._part = name

    def _begin_rows(self, filename: str) -> None:
        skip = self._on_bad_rows == "skip"
        self._table = table_kind(filename)
        if skip or self._table is not None:
            self._derived = DerivedRows(self.folder, self._max_bytes, self._require_space)
            self._checker = DatasetChecker(skip_bad_rows=skip, keep=self._derived.add)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self._take(data[start:end])
            return
        field = self._fields[self._part]
        field += data[start:end]
        if len(field) > MAX_FIELD_BYTES:
            raise PayloadTooLarge(f"the part '{self._part}' is larger than {MAX_FIELD_BYTES} bytes", param=self._part)

    def _on_end(self) -> None:
        self._complete = True

    def _take(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._max_bytes:
            raise self._too_large()
        if self._table is None:
            self._checker.feed(data)
        self._sha256.update(data)
        self._file.write(data)

    def _check_purpose(self) -> None:
        if bytes(self._fields["purpose"]) != PURPOSE.encode():
            raise InvalidRequest(f"only the purpose '{PURPOSE}' is supported", param="purpose", code="invalid_purpose")

    def _check_on_bad_rows(self) -> None:
        if self._on_bad_rows not in ON_BAD_ROWS:
            raise InvalidRequest(f"'on_bad_rows' must be {' or '.join(ON_BAD_ROWS)}", param="on_bad_rows")

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"a file may have at most {self._max_bytes} bytes", param="file")


def safe_filename(name: str) -> str:
    """A client's file name as text to show: its last component, without control characters, at most 255 long.

    It never becomes a path.
    """
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(character for character in last if unicodedata.category(character)[0] != "C")
    return printable[:255].strip() or "file"
