"""What a dataset row is, and reading rows from bytes while they stream in.

Owns the three row forms, the byte-level readers (JSON lines and one JSON array) and the check of every row with its
line number. Knows nothing of tokens, templates or files on disk.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.errors import InvalidDataset

Format = Literal["instruction", "completion", "chat"]
ROLES = ("system", "user", "assistant")
MAX_ROW_BYTES = 1 << 20
MAX_REPORTED_ERRORS = 100
# Distinct rows are remembered as 64-bit digests; past this many, duplicates are no longer counted (bounded memory).
MAX_ROWS_COMPARED = 200_000
HISTOGRAM_EDGES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Instruction:
    instruction: str
    output: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str
    weight: Literal[0, 1] = 1


@dataclass(frozen=True, slots=True)
class Chat:
    messages: tuple[Message, ...]


Example = Instruction | Completion | Chat


class RowError(ValueError):
    """One row does not fit.

    Args:
        path: where in the row (`messages[2].role`); empty for the row as a whole.
        code: a stable machine word.
    """

    def __init__(self, path: str, code: str, message: str) -> None:
        super().__init__(message)
        self.path, self.code, self.message = path, code, message


def parse_row(row: object) -> Example:
    """Make an example of one decoded JSON value.

    Keys we do not train on (Alpaca's `text`, ids, …) are allowed; `tools` and the like are refused by name, since
    leaving them out would train on something else than the row says.

    Raises:
        RowError: it is none of the three forms.
    """
    if not isinstance(row, dict):
        raise RowError("", "not_an_object", f"a row must be a JSON object, not {_kind(row)}")
    if "messages" in row:
        for key in ("tools", "functions", "parallel_tool_calls"):
            if row.get(key):
                raise RowError(key, "unsupported_key", f"'{key}' is not supported")
        return Chat(_messages(row["messages"]))
    if "instruction" in row:
        return Instruction(
            instruction=_text(row, "instruction"),
            output=_text(row, "output"),
            input=_text(row, "input", optional=True),
        )
    if "prompt" in row:
        return Completion(prompt=_text(row, "prompt", blank=True), completion=_text(row, "completion"))
    raise RowError(
        "", "unknown_form", "expected keys instruction+output, prompt+completion or messages; got " + _names(row)
    )


def format_of(example: Example) -> Format:
    return {Instruction: "instruction", Completion: "completion", Chat: "chat"}[type(example)]  # type: ignore[return-value]


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError("messages", "wrong_type", "'messages' must be a list of at least one message")
    messages = []
    for index, item in enumerate(value):
        path = f"messages[{index}]"
        if not isinstance(item, dict):
            raise RowError(path, "wrong_type", f"a message must be an object, not {_kind(item)}")
        role = item.get("role")
        if role not in ROLES:
            raise RowError(f"{path}.role", "unknown_role", f"'role' must be one of {', '.join(ROLES)}")
        for key in ("tool_calls", "function_call"):
            if item.get(key):
                raise RowError(f"{path}.{key}", "unsupported_key", f"'{key}' is not supported")
        weight = item.get("weight", 1)
        if weight not in (0, 1) or isinstance(weight, bool):
            raise RowError(f"{path}.weight", "wrong_value", "'weight' must be 0 or 1")
        messages.append(Message(role, _text(item, "content", path=f"{path}."), weight))
    if not any(message.role == "assistant" and message.weight for message in messages):
        raise RowError("messages", "nothing_to_learn", "no assistant message to learn from")
    return tuple(messages)


def _text(row: dict[str, Any], key: str, *, path: str = "", optional: bool = False, blank: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if value is None:
        raise RowError(path + key, "missing", f"'{key}' is missing")
    if not isinstance(value, str):
        raise RowError(path + key, "wrong_type", f"'{key}' must be a string, not {_kind(value)}")
    if not (optional or blank) and not value.strip():
        raise RowError(path + key, "blank", f"'{key}' is blank")
    if "\x00" in value:
        raise RowError(path + key, "invalid_text", f"'{key}' contains a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(path + key, "invalid_text", f"'{key}' contains a lone surrogate") from None
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(repr(str(key)[:40]) for key in list(row)[:8]) or "none"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise RowError("", "duplicate_key", "a key appears twice in one object")
    return keys


def _no_constant(name: str) -> None:
    raise RowError("", "invalid_number", f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


@dataclass(frozen=True, slots=True)
class Row:
    """One decoded value, or why there is none, at a 1-based line."""

    line: int
    value: object = None
    error: RowError | None = None


class RowReader:
    """Turns chunks of bytes into rows: JSON lines, or one JSON array, told apart by the first character.

    Memory is bounded by one row (`MAX_ROW_BYTES`) and one chunk. A row that is not JSON is an error row; in an array,
    and after an over-long row, nothing behind it can be trusted and reading ends there.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._line = 1
        self._form: Literal["unknown", "lines", "array"] = "unknown"
        self._opened = False
        self._expect_value = True
        self.ended = False

    def feed(self, chunk: bytes) -> Iterator[Row]:
        """Rows completed by `chunk`."""
        if self.ended:
            return
        self._buffer += chunk
        if self._form == "unknown" and not self._recognise(final=False):
            return
        yield from self._lines() if self._form == "lines" else self._array(final=False)

    def finish(self) -> Iterator[Row]:
        """The last row, if the input does not end in a line break, or what is missing."""
        if self.ended:
            return
        if self._form == "unknown" and not self._recognise(final=True):
            return
        if self._form == "array":
            yield from self._array(final=True)
            if not self.ended:
                yield self._end(RowError("", "invalid_json", "the array is not closed"))
        elif self._buffer.strip():
            yield self._decode_line(self._buffer)
        self.ended = True

    def _recognise(self, *, final: bool) -> bool:
        if len(self._buffer) < 4 and not final:
            return False
        if self._buffer[:2] in (b"\xff\xfe", b"\xfe\xff"):
            self._form = "lines"
            return True
        self._buffer = self._buffer.removeprefix(b"\xef\xbb\xbf")
        stripped = self._buffer.lstrip(b" \t\r\n")
        if not stripped and not final:
            self._skip(len(self._buffer))
            return False
        if not stripped:
            return False
        self._form = "array" if stripped[:1] == b"[" else "lines"
        return True

    def _skip(self, count: int) -> None:
        self._line += self._buffer.count(b"\n", 0, count)
        self._buffer = self._buffer[count:]

    def _end(self, error: RowError, line: int | None = None) -> Row:
        self.ended = True
        self._buffer = b""
        return Row(line or self._line, error=error)

    def _lines(self) -> Iterator[Row]:
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if len(line) > MAX_ROW_BYTES:
                yield self._end(_too_long())
                return
            if line.strip():
                yield self._decode_line(line)
            self._line += 1
        if len(self._buffer) > MAX_ROW_BYTES:
            yield self._end(_too_long())

    def _decode_line(self, raw: bytes) -> Row:
        if len(raw) > MAX_ROW_BYTES:
            return Row(self._line, error=_too_long())
        try:
            text = raw.decode().strip()
            value, end = _DECODER.raw_decode(text)
            if end != len(text):
                raise RowError("", "invalid_json", "more than one JSON value on the line")
        except ValueError as error:
            return Row(self._line, error=_as_row_error(error))
        except RecursionError:
            return Row(self._line, error=RowError("", "too_deep", "nested too deeply"))
        return Row(self._line, value)

    def _array(self, *, final: bool) -> Iterator[Row]:
        while True:
            self._skip(len(self._buffer) - len(self._buffer.lstrip(b" \t\r\n")))
            head = self._buffer[:1]
            if not head:
                return
            if not self._opened:
                self._opened = True
                self._skip(1)
            elif head == b"]":
                self._skip(1)
                trailing = self._buffer.strip()
                self.ended = True
                if trailing:
                    yield self._end(RowError("", "invalid_json", "text after the array"))
                return
            elif not self._expect_value:
                if head != b",":
                    yield self._end(RowError("", "invalid_json", "expected ',' or ']' between rows"))
                    return
                self._skip(1)
                self._expect_value = True
            else:
                row, size = self._decode_element(final=final)
                if row is None:
                    return
                yield row
                if self.ended:
                    return
                self._skip(size)
                self._expect_value = False

    def _decode_element(self, *, final: bool) -> tuple[Row | None, int]:
        """The next element and its size in bytes; None while it may still be incomplete."""
        line = self._line
        window = self._buffer[: MAX_ROW_BYTES + 1]
        try:
            # A chunk may end inside a character; only what decodes is looked at.
            text = window.decode(errors="strict" if final and len(window) == len(self._buffer) else "ignore")
            value, end = _DECODER.raw_decode(text)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError) and not final and len(window) <= MAX_ROW_BYTES:
                return None, 0
            if len(window) > MAX_ROW_BYTES:
                return self._end(_too_long(), line), 0
            offset = error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0
            return self._end(_as_row_error(error), line + offset), 0
        except RecursionError:
            return self._end(RowError("", "too_deep", "nested too deeply"), line), 0
        size = len(text[:end].encode())
        # A number at the end of the buffer may go on in the next chunk.
        if size == len(self._buffer) and not final:
            return None, 0
        return Row(line, value), size


def _too_long() -> RowError:
    return RowError("", "row_too_long", f"a row may have at most {MAX_ROW_BYTES} bytes")


def _as_row_error(error: ValueError) -> RowError:
    if isinstance(error, RowError):
        return error
    if isinstance(error, UnicodeDecodeError):
        return RowError("", "invalid_encoding", f"not UTF-8 (byte {error.start + 1} of the row)")
    if isinstance(error, json.JSONDecodeError):
        return RowError("", "invalid_json", f"{error.msg} (column {error.colno})")
    return RowError("", "invalid_json", "a number is too long")


@dataclass(slots=True)
class DatasetReport:
    """What is known of a dataset whose every row is good; lengths are characters of all texts of a row."""

    format: Format = "instruction"
    rows: int = 0
    duplicates: int = 0
    length_histogram: list[dict[str, int | None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class DatasetChecker:
    """Checks a dataset while its bytes stream by; feed it every chunk, then call `finish`."""

    def __init__(self) -> None:
        self._reader = RowReader()
        self._errors: list[dict[str, Any]] = []
        self._error_count = 0
        self._format: Format | None = None
        self._rows = 0
        self._seen: set[bytes] = set()
        self._duplicates = 0
        self._counts = [0] * (len(HISTOGRAM_EDGES) + 1)

    def feed(self, chunk: bytes) -> None:
        """Check the rows completed by `chunk`.

        Raises:
            InvalidDataset: as soon as there are more errors than are reported, or reading cannot go on.
        """
        for row in self._reader.feed(chunk):
            self._take(row)
        if self._reader.ended and self._errors:
            raise self._invalid()

    def finish(self) -> DatasetReport:
        """The report on the whole file.

        Raises:
            InvalidDataset: any row is bad, or there is none.
        """
        for row in self._reader.finish():
            self._take(row)
        if not self._rows and not self._errors:
            self._add_error(Row(1, error=RowError("", "empty", "the file has no rows")))
        if self._errors:
            raise self._invalid()
        assert self._format is not None
        return DatasetReport(self._format, self._rows, self._duplicates, self._histogram(), self._warnings())

    def _take(self, row: Row) -> None:
        try:
            if row.error:
                raise row.error
            example = parse_row(row.value)
            form = format_of(example)
            if self._format is None:
                self._format = form
            elif form != self._format:
                raise RowError("", "mixed_forms", f"a {form} row in a file that began with {self._format} rows")
        except RowError as error:
            self._add_error(Row(row.line, error=error))
            return
        self._rows += 1
        self._measure(example)

    def _measure(self, example: Example) -> None:
        texts = texts_of(example)
        length = sum(map(len, texts))
        self._counts[sum(length > edge for edge in HISTOGRAM_EDGES)] += 1
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
        else:
            raise self._invalid()

    def _invalid(self) -> InvalidDataset:
        first = self._errors[0]
        where = f"line {first['line']}" + (f", {first['path']}" if first["path"] else "")
        more = f" (and {self._error_count - 1} more)" if self._error_count > 1 else ""
        return InvalidDataset(f"{where}: {first['message']}{more}", self._errors, self._error_count)

    def _histogram(self) -> list[dict[str, int | None]]:
        edges: Iterable[int | None] = (*HISTOGRAM_EDGES, None)
        return [{"up_to": edge, "rows": rows} for edge, rows in zip(edges, self._counts, strict=True) if rows]

    def _warnings(self) -> list[str]:
        warnings = []
        if self._rows < 50:
            warnings.append(f"{self._rows} rows teach a model little; 50 is a sensible minimum")
        elif self._rows < 100:
            warnings.append(f"with {self._rows} rows, a better prompt may do as well as training: try that first")
        if self._duplicates:
            warnings.append(f"{self._duplicates} rows are exact duplicates of others")
        return warnings


def texts_of(example: Example) -> list[str]:
    """All texts of an example, in order."""
    if isinstance(example, Instruction):
        return [example.instruction, example.input, example.output]
    if isinstance(example, Completion):
        return [example.prompt, example.completion]
    return [text for message in example.messages for text in (message.role, message.content)]


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
