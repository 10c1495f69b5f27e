"""The rows that a file is learnt from where these are not its own bytes: JSON Lines beside it, named by their hash."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from shared.datasets.reader import MAX_ROW_BYTES, RowError
from shared.errors import PayloadTooLarge
from shared.storage.artifacts import derived_name

PART = "rows.part"
BYTES_BETWEEN_LOOKS = 8 << 20


class DerivedRows:
    """Writes the derived file of an upload into its staged folder.

    Args:
        folder: the staged folder.
        max_bytes: of the derived file.
        require_space: raises OSError if the disk is full; asked again and again.
    """

    def __init__(self, folder: Path, max_bytes: int, require_space: Callable[[], None]) -> None:
        self._folder = folder
        self._file = (folder / PART).open("wb")
        self._max_bytes = max_bytes
        self._require_space = require_space
        self._sha256 = hashlib.sha256()
        self._next_look = 0
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def add(self, row: object) -> None:
        """Write one row.

        Raises:
            RowError: it cannot be written as JSON, or as a row that may be read again.
            PayloadTooLarge: the file is.
            OSError: the disk is full.
        """
        try:
            line = _as_json(row)
        except ValueError:
            raise RowError("", "invalid_number", "a number is too large") from None
        if len(line) > MAX_ROW_BYTES:
            raise RowError("", "row_too_long", f"a row may have at most {MAX_ROW_BYTES} bytes")
        self.size += len(line) + 1
        if self.size > self._max_bytes:
            raise PayloadTooLarge(f"its rows as JSON Lines have more than {self._max_bytes} bytes", param="file")
        if self.size >= self._next_look:
            self._require_space()
            self._next_look = self.size + BYTES_BETWEEN_LOOKS
        self._sha256.update(line + b"\n")
        self._file.write(line + b"\n")

    def finish(self) -> None:
        """Give the file its name."""
        self._file.close()
        (self._folder / PART).rename(self._folder / derived_name(self.sha256))

    def discard(self) -> None:
        """Leave no file."""
        self.close()
        (self._folder / PART).unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


def _as_json(row: object) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, in a key that is not learnt from.
        return json.dumps(row, allow_nan=False, separators=(",", ":")).encode()
