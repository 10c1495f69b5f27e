"""What a dataset row is: the three row forms, and the check of a whole dataset while its bytes stream by.

Knows nothing of tokens and templates; where bytes become rows is `shared.datasets.reader`.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.datasets.reader import Row, RowError, RowReader
from shared.errors import InvalidDataset

Format = Literal["instruction", "completion", "chat"]
ROLES = ("system", "user", "assistant")
MAX_REPORTED_ERRORS = 100
# A chat template renders a conversation once for each of its replies: time grows with the square of their number.
MAX_MESSAGES = 512
# Distinct rows are remembered as 64-bit digests; past this many, duplicates are no longer counted (bounded memory).
MAX_ROWS_COMPARED = 200_000
# The reference tutorial's advice; how much data is enough depends on the task, so these are warnings, never errors.
FEW_ROWS = 50
PROMPT_FIRST_ROWS = 100
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
    if len(value) > MAX_MESSAGES:
        raise RowError(
            "messages", "too_many_messages", f"a row has at most {MAX_MESSAGES} messages, this one has {len(value)}"
        )
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
        if self._rows < FEW_ROWS:
            warnings.append(f"a model learns little from fewer than {FEW_ROWS} rows; this file has {self._rows}")
        if self._rows < PROMPT_FIRST_ROWS:
            warnings.append(
                f"with fewer than {PROMPT_FIRST_ROWS} rows, a better prompt may do as well as training: try that first"
            )
            warnings.append("training teaches form and style; facts that change belong in retrieval, not in weights")
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
