"""Rows out of bytes: however the bytes are cut, the rows and their lines are the same."""

import json
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.datasets.reader import Row, RowReader

GOOD = b'{"instruction": "a", "output": "b"}'
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
rows = st.lists(st.dictionaries(text, values, max_size=4), max_size=8)


def read(data: bytes, cuts: random.Random | None = None) -> list[Row]:
    reader = RowReader()
    found: list[Row] = []
    while data:
        size = len(data) if cuts is None else cuts.randint(1, 7)
        found += reader.feed(data[:size])
        data = data[size:]
    return [*found, *reader.finish()]


line_ends = st.sampled_from([b"\n", b"\r\n", b"\n\n"])


@given(rows, st.randoms(use_true_random=False), st.booleans(), line_ends, st.booleans())
def test_lines_round_trip_however_they_are_cut(
    expected: list[Any], cuts: random.Random, ascii_only: bool, end: bytes, last: bool
) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode() for row in expected]
    data = end.join(lines) + (end if last else b"")
    found = read(data, cuts)
    assert [row.value for row in found] == expected
    assert [row.line for row in found] == [1 + end.count(b"\n") * n for n in range(len(expected))]
    assert found == read(data)


@given(rows, st.randoms(use_true_random=False), st.booleans(), st.sampled_from([None, 1]), st.booleans())
def test_arrays_round_trip_however_they_are_cut(
    expected: list[Any], cuts: random.Random, ascii_only: bool, indent: int | None, bom: bool
) -> None:
    data = json.dumps(expected, ensure_ascii=ascii_only, indent=indent).encode()
    found = read((b"\xef\xbb\xbf" if bom else b"") + b" \n" + data, cuts)
    assert [row.value for row in found] == expected
    assert all(row.error is None for row in found)
    if indent:
        at = [number for number, line in enumerate(data.split(b"\n"), start=2) if line.startswith(b" {")]
        assert [row.line for row in found] == at


# Bytes that mean something to the reader come more often than the others.
noise = st.lists(
    st.sampled_from([*(bytes([b]) for b in b'[]{},:"\\\n \r1-e'), b"null", b"NaN", "ü".encode(), b"\xe2\x82", GOOD])
    | st.binary(min_size=1, max_size=2),
    max_size=14,
).map(b"".join)


@settings(max_examples=400)
@given(noise, st.sampled_from([b"", b"[", b"[{", b'{"a":', b"[" + GOOD]), st.randoms(use_true_random=False))
def test_no_bytes_break_the_reader_and_cuts_change_nothing(data: bytes, prefix: bytes, cuts: random.Random) -> None:
    whole, cut = read(prefix + data), read(prefix + data, cuts)
    assert [(row.line, row.value, str(row.error)) for row in whole] == [
        (row.line, row.value, str(row.error)) for row in cut
    ]


@settings(max_examples=400)
@given(noise)
def test_what_the_array_reader_accepts_is_what_json_accepts(data: bytes) -> None:
    def strict(_: str) -> None:
        raise ValueError

    try:
        expected = json.loads(b"[" + data + b"]", parse_constant=strict)
    except ValueError:
        expected = None
    found = read(b"[" + data + b"]")
    if expected is None:
        assert any(row.error for row in found)
    elif not any(row.error and row.error.code == "duplicate_key" for row in found):
        assert [row.value for row in found] == expected
