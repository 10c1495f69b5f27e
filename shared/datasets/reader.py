"""Rows out of bytes while they stream in: JSON lines, or one JSON array. Knows JSON, not what a row means.

Every row has its 1-based line. How the bytes were cut into chunks never changes what is read.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

MAX_ROW_BYTES = 1 << 20
_BLANK = b" \t\r\n"


class RowError(ValueError):
    """One row does not fit.

    Args:
        path: where in the row (`messages[2].role`); empty for the row as a whole.
        code: a stable machine word.
    """

    def __init__(self, path: str, code: str, message: str) -> None:
        super().__init__(message)
        self.path, self.code, self.message = path, code, message


@dataclass(frozen=True, slots=True)
class Row:
    """One decoded value, or why there is none, at a 1-based line."""

    line: int
    value: object = None
    error: RowError | None = None


class _Form(Protocol):
    """One of the two forms, from the first byte that is not blank."""

    ended: bool

    def read(self, data: bytes, *, final: bool) -> Iterator[Row]: ...


class RowReader:
    """Turns chunks of bytes into rows; the first character tells lines from an array.

    Memory is bounded by one row (`MAX_ROW_BYTES`) and one chunk. A row that is not JSON is an error row. After an
    over-long row, and where an array is no longer JSON or UTF-8, nothing behind can be trusted and reading ends.
    """

    def __init__(self) -> None:
        self._head = b""
        self._line = 1
        self._start_of_file = True
        self._form: _Form | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will be read, whatever comes."""
        return self._form is not None and self._form.ended

    def feed(self, chunk: bytes) -> Iterator[Row]:
        """Rows completed by `chunk`."""
        yield from self._read(chunk, final=False)

    def finish(self) -> Iterator[Row]:
        """The last row, if the input does not end in a line break, or what is missing."""
        yield from self._read(b"", final=True)

    def _read(self, chunk: bytes, *, final: bool) -> Iterator[Row]:
        if self.ended:
            return
        if self._form is None:
            self._head += chunk
            self._form = self._recognised(final=final)
            chunk = self._head
        if self._form is not None:
            yield from self._form.read(chunk, final=final)

    def _recognised(self, *, final: bool) -> _Form | None:
        if self._start_of_file:
            if len(self._head) < 3 and not final:
                return None
            self._start_of_file = False
            if self._head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return _Utf16()
            self._head = self._head.removeprefix(b"\xef\xbb\xbf")
        content = self._head.lstrip(_BLANK)
        self._line += self._head.count(b"\n", 0, len(self._head) - len(content))
        self._head = content
        if not content:
            return None
        return _Array(self._line) if content[:1] == b"[" else _Lines(self._line)


class _Utf16:
    """Not read at all: one clear error is better than one per line."""

    ended = False

    def read(self, data: bytes, *, final: bool) -> Iterator[Row]:
        self.ended = True
        yield Row(1, error=RowError("", "invalid_encoding", "the file is UTF-16; save it as UTF-8"))


class _Lines:
    """One JSON value per line; blank lines are passed over."""

    def __init__(self, line: int) -> None:
        self.ended = False
        self._line = line
        self._rest = b""

    def read(self, data: bytes, *, final: bool) -> Iterator[Row]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if final:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            if len(line) > MAX_ROW_BYTES:
                break
            if line.strip(_BLANK):
                yield _decoded(line, self._line)
            self._line += 1
        else:
            if len(self._rest) <= MAX_ROW_BYTES:
                return
        self.ended = True
        yield Row(self._line, error=_too_long())


class _Array:
    """The elements of one JSON array.

    An element's end is found before it is decoded, by brackets and quotes alone and in one pass over the characters;
    that distinguishes an incomplete element from a wrong one.
    """

    def __init__(self, line: int) -> None:
        self.ended = False
        self._line = line
        # The end of a chunk may cut a character in two.
        self._tail = b""
        self._text = ""
        self._at = 0
        self._expect: Literal["opening", "first", "value", "separator", "nothing"] = "opening"
        self._scan = _Scan()

    def read(self, data: bytes, *, final: bool) -> Iterator[Row]:
        text, self._tail, broken = _decoded_prefix(self._tail + data, final=final)
        self._text, self._at = self._text[self._at :] + text, 0
        yield from self._elements(final=final and broken is None)
        if self.ended:
            return
        if broken is not None:
            line = self._line + self._text.count("\n", self._at)
            yield self._end(RowError("", "invalid_encoding", f"not UTF-8 (byte 0x{broken:02x})"), line)
        elif final and self._expect != "nothing":
            yield self._end(RowError("", "invalid_json", "the array is not closed"))

    def _elements(self, *, final: bool) -> Iterator[Row]:
        while not self.ended:
            if not self._scan.begun:
                self._skip_blanks()
            if self._at == len(self._text):
                return
            head = self._text[self._at]
            if self._expect == "opening":
                self._step("first")
            elif self._expect == "nothing":
                yield self._end(RowError("", "invalid_json", "text after the array"))
            elif head == "]" and self._expect in ("first", "separator"):
                self._step("nothing")
            elif self._expect == "separator":
                if head == ",":
                    self._step("value")
                else:
                    yield self._end(RowError("", "invalid_json", "expected ',' or ']' between rows"))
            else:
                end = self._scan.end_of_value(self._text, self._at, final=final)
                if end is None:
                    if len(self._text) - self._at > MAX_ROW_BYTES:
                        yield self._end(_too_long())
                    elif final:
                        yield self._end(RowError("", "invalid_json", "the file ends in the middle of a row"))
                    return
                yield self._element(end)

    def _element(self, end: int) -> Row:
        raw, line = self._text[self._at : end].encode(), self._line
        if len(raw) > MAX_ROW_BYTES:
            return self._end(_too_long())
        row = _decoded(raw, line)
        if row.error is not None and row.error.code == "invalid_json":
            # Where quotes or brackets do not match, the end that was found is a guess.
            self.ended = True
        self._line += self._text.count("\n", self._at, end)
        self._at, self._expect, self._scan = end, "separator", _Scan()
        return row

    def _skip_blanks(self) -> None:
        match = _BLANKS.match(self._text, self._at)
        assert match is not None
        self._line += self._text.count("\n", self._at, match.end())
        self._at = match.end()

    def _step(self, expect: Literal["first", "value", "nothing"]) -> None:
        self._at += 1
        self._expect = expect

    def _end(self, error: RowError, line: int | None = None) -> Row:
        self.ended = True
        return Row(line or self._line, error=error)


_BLANKS = re.compile(r"[ \t\r\n]*")
_STRUCTURE = re.compile(r'["{}\[\]]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')
_AFTER_SCALAR = re.compile(r"[\s,\]}]")


class _Scan:
    """How far the end of one JSON value has been looked for; goes on where the text ended last time."""

    def __init__(self) -> None:
        self.begun = False
        self._offset = 0
        self._depth = 0
        self._in_string = False
        self._in_scalar = False

    def end_of_value(self, text: str, start: int, *, final: bool) -> int | None:
        """Where the value that begins at `start` ends; None if the text ends before it.

        Args:
            text: the same from `start` on as last time, or longer.
        """
        self.begun = True
        at = start + self._offset
        while True:
            if self._in_string:
                match = _QUOTE_OR_ESCAPE.search(text, at)
                if match is None or (match[0] == "\\" and match.end() == len(text)):
                    at = len(text) if match is None else match.start()
                    break
                at = match.end()
                if match[0] == "\\":
                    at += 1
                    continue
                self._in_string = False
            elif self._in_scalar or (self._depth == 0 and text[at] not in '"{['):
                # A number, a word, or nothing sensible: it reaches to whatever can follow a value.
                self._in_scalar = True
                match = _AFTER_SCALAR.search(text, at)
                if match is None and not final:
                    at = len(text)
                    break
                # Whatever stands at the very start belongs to it, so that something is always consumed.
                return max(match.start() if match else len(text), start + 1)
            else:
                match = _STRUCTURE.search(text, at)
                if match is None:
                    at = len(text)
                    break
                at = match.end()
                if match[0] == '"':
                    self._in_string = True
                    continue
                self._depth += 1 if match[0] in "{[" else -1
            if self._depth <= 0:
                return at
        self._offset = at - start
        return None


def _decoded_prefix(data: bytes, *, final: bool) -> tuple[str, bytes, int | None]:
    """As much of `data` as is UTF-8, the cut-off character behind it, and the first byte that is wrong, if one is."""
    try:
        return data.decode(), b"", None
    except UnicodeDecodeError as error:
        text = data[: error.start].decode()
        if error.reason == "unexpected end of data" and not final:
            return text, data[error.start :], None
        return text, b"", data[error.start]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise RowError("", "duplicate_key", "a key appears twice in one object")
    return keys


def _no_constant(name: str) -> None:
    raise RowError("", "invalid_number", f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _decoded(raw: bytes, line: int) -> Row:
    try:
        text = raw.decode().strip()
        value, end = _DECODER.raw_decode(text)
        if end != len(text):
            raise RowError("", "invalid_json", "more than one JSON value on the line")
        return Row(line, value)
    except RowError as error:
        return Row(line, error=error)
    except UnicodeDecodeError as error:
        return Row(line, error=RowError("", "invalid_encoding", f"not UTF-8 (byte {error.start + 1} of the line)"))
    except json.JSONDecodeError as error:
        inner = line + error.lineno - 1
        return Row(inner, error=RowError("", "invalid_json", f"{error.msg} (column {error.colno})"))
    except ValueError:
        # Python refuses to convert integers of more than 4,300 digits.
        return Row(line, error=RowError("", "invalid_number", "a number is too long"))
    except RecursionError:
        return Row(line, error=RowError("", "too_deep", "nested too deeply"))


def _too_long() -> RowError:
    return RowError("", "row_too_long", f"a row may have at most {MAX_ROW_BYTES} bytes")
