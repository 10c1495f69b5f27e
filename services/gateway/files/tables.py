"""A program of its own: reads a CSV or Parquet file and writes a line of JSON for each of its rows.

`python -I tables.py KIND FILE LIMITS`, KIND being csv, tsv or parquet, and LIMITS an object of JSON. It imports nothing
of this project: what reads files of strangers has no secrets, writes nothing but its output, and ends at its limits.

Lines of the output: `{"columns": […], "delimiter": …}` first; `{"line": n, "row": {…}}` or `{"line": n, "error": […]}`
(code and message) for each row, n of a Parquet file being the row's number; last `{"end": rows}`, or `{"failed": […]}`
(line, code and message).
"""

import contextlib
import csv
import json
import math
import resource
import sys
from collections.abc import Iterator
from typing import Any

# By these a header is told from a header that was divided at the wrong character.
KNOWN = ("instruction", "input", "output", "system", "history", "prompt", "completion", "text", "messages")


class Failed(Exception):
    """Nothing behind can be read. Args: line, code, message."""


def main() -> int:
    kind, path, limits = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        # Where memory is short all the same, this process goes and not the gateway.
        score.write("1000")
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"], limits["seconds"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = parquet_lines(path, limits["rows"]) if kind == "parquet" else csv_lines(path, kind, limits["row_bytes"])
    rows = 0
    try:
        for line in lines:
            rows += "line" in line
            if rows > limits["rows"]:
                raise Failed(line["line"], "too_many_rows", f"a table has at most {limits['rows']} rows")
            write(line, limits["row_bytes"])
        last: dict[str, Any] = {"end": rows}
    except Failed as failed:
        last = {"failed": failed.args}
    except MemoryError:
        last = {"failed": [rows + 1, "memory", "out of memory"]}
    write(last, sys.maxsize)
    sys.stdout.flush()
    return 0


def write(line: dict[str, Any], row_bytes: int) -> None:
    try:
        written = json.dumps(line, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        # A float that JSON does not have, or half a surrogate pair.
        written = json.dumps(
            {"line": line["line"], "error": ["invalid_number", "a number that JSON does not have"]}
        ).encode()
    if len(written) > row_bytes:
        written = json.dumps({"line": line["line"], "error": ["row_too_long", "the row has too many bytes"]}).encode()
    sys.stdout.buffer.write(written + b"\n")


def csv_lines(path: str, kind: str, row_bytes: int) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise Failed(1, "invalid_encoding", "the file is UTF-16; save it as UTF-8")
    csv.field_size_limit(row_bytes)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = None
        try:
            first = file.readline(row_bytes)
            delimiter = "\t" if kind == "tsv" else max(",;\t", key=lambda each: known_names(first, each))
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            named = [name for name in header if name]
            if len(set(named)) < len(named):
                raise Failed(1, "duplicate_key", "two columns have the same name")
            yield {"columns": named, "delimiter": delimiter}
            yield from records(reader, header)
        except UnicodeDecodeError:
            at = reader.line_num + 1 if reader else 1
            raise Failed(at, "invalid_encoding", "not UTF-8 on this line or soon behind; save it as UTF-8") from None
        except csv.Error as error:
            raise Failed(reader.line_num if reader else 1, "invalid_csv", str(error)) from None


def records(reader: Any, header: list[str]) -> Iterator[dict[str, Any]]:
    line = reader.line_num + 1
    for cells in reader:
        if cells and len(cells) != len(header):
            message = f"{len(cells)} cells, and the header has {len(header)}"
            yield {"line": line, "error": ["wrong_cells", message]}
        elif cells:
            # A column without a name is an index that the exporting library has added.
            yield {"line": line, "row": {name: cell for name, cell in zip(header, cells, strict=True) if name}}
        line = reader.line_num + 1


def known_names(line: str, delimiter: str) -> int:
    try:
        names = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return 0
    return sum(name.strip().lower() in KNOWN for name in names)


def parquet_lines(path: str, most_rows: int) -> Iterator[dict[str, Any]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    pa.set_cpu_count(1)
    row = 0
    try:
        file = pq.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=1 << 20)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise Failed(1, "duplicate_key", "two columns have the same name")
        if file.metadata.num_rows > most_rows:
            raise Failed(1, "too_many_rows", f"a table has at most {most_rows} rows")
        yield {"columns": columns, "delimiter": None}
        for batch in file.iter_batches(batch_size=32, use_threads=False):
            for values in rows_of(batch):
                row += 1
                yield {"line": row, "row": values} if isinstance(values, dict) else {"line": row, "error": values}
    except pa.ArrowMemoryError:
        raise MemoryError from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Failed(
            row + 1, "invalid_parquet", str(error).splitlines()[0][:300] if str(error) else "damaged"
        ) from None


def rows_of(batch: Any) -> Iterator[dict[str, Any] | list[str]]:
    try:
        columns = [column.to_pylist() for column in batch.columns]
        rows = [
            dict(zip(batch.schema.names, map(as_json, values), strict=True)) for values in zip(*columns, strict=True)
        ]
    except (ValueError, OverflowError):
        # A value that Python cannot hold: found again, cell by cell.
        yield from (one_row(batch, row) for row in range(batch.num_rows))
    else:
        yield from rows


def one_row(batch: Any, row: int) -> dict[str, Any] | list[str]:
    try:
        return {
            name: as_json(column[row].as_py()) for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
    except UnicodeDecodeError:
        return ["invalid_encoding", "a text is not UTF-8"]
    except (ValueError, OverflowError) as error:
        return ["wrong_value", str(error)[:300]]


def as_json(value: Any) -> Any:
    """A value as JSON has it; what JSON does not have becomes an object, which no text field takes."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    return {type(value).__name__: str(value)}


if __name__ == "__main__":
    sys.exit(main())
