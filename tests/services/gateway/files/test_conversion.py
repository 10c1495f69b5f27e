"""Tables become rows in a process with limits; what is wrong with one is told by line, and no limit is passed."""

import csv
import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.files import conversion
from services.gateway.files.conversion import Kind, Limits, check_table
from shared.datasets.checker import DatasetChecker, DatasetReport
from shared.errors import InvalidDataset, InvalidRequest, Overloaded


def converted(
    path: Path, kind: Kind = "csv", *, skip: bool = False, limits: Limits | None = None
) -> tuple[str, list[Any], DatasetReport]:
    """(how, rows, report)."""
    kept: list[Any] = []
    checker = DatasetChecker(skip_bad_rows=skip, keep=kept.append)
    how = check_table(kind, path, checker, limits)
    return how, kept, checker.finish()


def errors_of(path: Path, kind: Kind = "csv", *, skip: bool = False) -> list[tuple[int, str, str]]:
    with pytest.raises(InvalidDataset) as refused:
        converted(path, kind, skip=skip)
    return [(error["line"], error["path"], error["code"]) for error in refused.value.errors]


def written(tmp_path: Path, data: bytes | dict[str, Any]) -> Path:
    path = tmp_path / "table"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        pq.write_table(pa.table(data), path)
    return path


@pytest.mark.parametrize(
    ("data", "kind", "rows", "divided"),
    [
        (
            b'instruction,input,output\r\n"Say ""7"",\ntwice.",,7 7\r\n\r\nb,c,d\r\n',
            "csv",
            [
                {"instruction": 'Say "7",\ntwice.', "input": "", "output": "7 7"},
                {"instruction": "b", "input": "c", "output": "d"},
            ],
            "commas",
        ),
        # Excel where commas are decimal points; the byte order mark is its own too.
        (b'\xef\xbb\xbfinstruction;output\n"a, b";c\n', "csv", [{"instruction": "a, b", "output": "c"}], "semicolons"),
        (b"prompt\tcompletion\na\tb\n", "tsv", [{"prompt": "a", "completion": "b"}], "tabs"),
        (b"prompt\tcompletion\na,c\tb\n", "csv", [{"prompt": "a,c", "completion": "b"}], "tabs"),
        # pandas' index has no name.
        (b",text\n0,a\n1,b\n", "csv", [{"text": "a"}, {"text": "b"}], "commas"),
        (
            b'messages\n"[{""role"":""user"",""content"":""a""},{""role"":""assistant"",""content"":""b""}]"\n',
            "csv",
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            "commas",
        ),
        (b"prompt,completion\n[a,b\n", "csv", [{"prompt": "[a", "completion": "b"}], "commas"),
    ],
)
def test_csv_as_people_have_it(
    tmp_path: Path, data: bytes, kind: Kind, rows: list[dict[str, Any]], divided: str
) -> None:
    how, kept, report = converted(written(tmp_path, data), kind)
    assert kept == rows
    assert report.rows == len(rows)
    assert how.endswith(f"divided by {divided}, became an object")


@pytest.mark.parametrize(
    ("data", "errors"),
    [
        (b"", [(1, "", "empty")]),
        (b"instruction,output\n", [(1, "", "empty")]),
        # Lines are the file's, whatever a cell holds.
        (b'instruction,output\n"a\nb",c\nd,\n', [(4, "output", "blank")]),
        (b"instruction,output\na,b,c\nd,e\nf\n", [(2, "", "wrong_cells"), (4, "", "wrong_cells")]),
        (b"a,b\nc,d\n", [(2, "", "unknown_form")]),
        (b"instruction,instruction\nc,d\n", [(1, "", "duplicate_key")]),
        (b'instruction,output\na,"b"c\nd,e\n', [(2, "", "invalid_csv")]),
        (b'instruction,output\na,b\nc,"d\n', [(3, "", "invalid_csv")]),
        (b"instruction,output\na,caf\xe9\n", [(1, "", "invalid_encoding")]),
        ("instruction,output\na,b\n".encode("utf-16"), [(1, "", "invalid_encoding")]),
        (b"instruction,output\na," + b"x" * ((1 << 20) + 50) + b"\n", [(2, "", "row_too_long")]),
        (b"instruction,output\na," + b"x" * (2 << 20) + b"\n", [(2, "", "invalid_csv")]),
        (b"messages\n[{\n", [(2, "messages", "wrong_type")]),
    ],
)
def test_what_is_wrong_with_a_csv_has_its_line(tmp_path: Path, data: bytes, errors: list[tuple[int, str, str]]) -> None:
    assert errors_of(written(tmp_path, data)) == errors


def test_of_a_table_bad_rows_are_skipped_but_not_what_ends_the_reading(tmp_path: Path) -> None:
    data = b"instruction,output\na,b\nc\nd,\ne,f\n"
    _, kept, report = converted(written(tmp_path, data), skip=True)
    assert [row["instruction"] for row in kept] == ["a", "e"]
    assert [(entry["line"], entry["code"]) for entry in report.skipped] == [(3, "wrong_cells"), (4, "blank")]
    assert errors_of(written(tmp_path, data + b'g,"h\n'), skip=True)[-1] == (6, "", "invalid_csv")


def test_parquet_of_a_datasets_export(tmp_path: Path) -> None:
    """Arrow gives every message every key."""
    messages = [{"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b", "weight": 1.0}]
    how, kept, report = converted(written(tmp_path, {"messages": [messages] * 70, "tools": [None] * 70}), "parquet")
    assert kept == [{"messages": messages, "tools": None}] * 70
    assert (report.format, report.rows, how) == ("chat", 70, "each row of 2 columns became an object")


def test_values_that_json_does_not_have_are_no_text(tmp_path: Path) -> None:
    other = {"day": [date(2026, 1, 1)] * 2, "picture": [b"\x89PNG", None], "score": [float("nan"), 1.0]}
    path = written(tmp_path, {"prompt": ["a"] * 2, "completion": ["b"] * 2, **other})
    _, kept, report = converted(path, "parquet")
    assert kept[0] | {"day": 0} == {"prompt": "a", "completion": "b", "day": 0, "picture": {"bytes": 4}, "score": None}
    assert report.rows == 2
    path = written(tmp_path, {"prompt": ["a", "a"], "completion": [b"b", b"b"]})
    assert errors_of(path, "parquet") == [(1, "completion", "wrong_type"), (2, "completion", "wrong_type")]
    infinite = {"prompt": ["a"], "completion": ["b"], "score": [float("inf")]}
    assert errors_of(written(tmp_path, infinite), "parquet") == [(1, "", "invalid_number")]


def test_a_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(
        3, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])), pa.py_buffer(b"a\xffc")
    )
    path = written(tmp_path, {"prompt": broken, "completion": ["b"] * 3})
    assert errors_of(path, "parquet") == [(2, "", "invalid_encoding")]


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -8])
def test_damaged_parquet_is_refused(tmp_path: Path, cut: int) -> None:
    whole = written(tmp_path, {"prompt": ["a"] * 100, "completion": ["b"] * 100}).read_bytes()
    assert errors_of(written(tmp_path, whole[:cut]), "parquet")[-1][2] == "invalid_parquet"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert errors_of(path, "parquet") == [(1, "", "duplicate_key")]


@pytest.mark.parametrize(
    "limits",
    [
        # Too little for Arrow itself; for one batch of rows; too little time.
        Limits(memory=128 << 20),
        Limits(),
        Limits(seconds=1),
    ],
)
def test_a_table_that_swells_is_stopped(tmp_path: Path, limits: Limits) -> None:
    """Some kilobytes on the disk are gigabytes of rows: one text, many times."""
    size = 100 << 20 if limits == Limits() else 900_000
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * size]))
    path = written(tmp_path, {"prompt": many, "completion": ["b"] * 20_000})
    assert path.stat().st_size < 10 << 20
    with pytest.raises(InvalidRequest) as refused:
        converted(path, "parquet", limits=limits)
    assert refused.value.code == "table_limits"
    assert "write smaller row groups" in refused.value.message


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_too_many_rows_are_refused(tmp_path: Path, kind: Kind) -> None:
    data: Any = b"text\n" + b"a\n" * 20 if kind == "csv" else {"text": ["a"] * 20}
    path = written(tmp_path, data)
    assert converted(path, kind, limits=Limits(rows=20))[2].rows == 20
    with pytest.raises(InvalidDataset, match="at most 19 rows"):
        converted(path, kind, limits=Limits(rows=19))


def test_only_so_many_tables_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, b"text\na\n")
    monkeypatch.setattr(conversion, "WAIT_SECONDS", 0.01)
    with conversion._slots, conversion._slots, pytest.raises(Overloaded):
        converted(path)
    assert converted(path)[2].rows == 1


def test_the_reader_has_none_of_the_gateways_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os\nprint(json.dumps({'line': 1, 'row': {'text': ' '.join(os.environ)}}))\n"
        "print(json.dumps({'end': 1}))\n"
    )
    monkeypatch.setattr(conversion, "PROGRAM", program)
    monkeypatch.setenv("TUNESMITH_KEY_SECRET", "secret")
    _, kept, _ = converted(tmp_path)
    assert "PATH" in kept[0]["text"]
    assert "TUNESMITH" not in kept[0]["text"]


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=30), st.booleans())
def test_what_python_writes_as_csv_comes_back(tmp_path: Path, rows: list[tuple[str, str]], quoted: bool) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    writer.writerows([("instruction", "output"), *rows])
    _, kept, _ = converted(written(tmp_path, text.getvalue().encode()))
    assert [(row["instruction"], row["output"]) for row in kept] == rows
    assert json.dumps(kept)
