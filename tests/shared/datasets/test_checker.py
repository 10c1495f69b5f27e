"""The check of whole datasets: what is bad has its line, its path and its code."""

from pathlib import Path

import pytest

from shared.datasets import checker as checking
from shared.datasets.checker import MAX_REPORTED_ERRORS, DatasetChecker, DatasetReport, read_examples
from shared.datasets.examples import Instruction
from shared.datasets.reader import MAX_ROW_BYTES, RowError
from shared.errors import InvalidDataset

GOOD = b'{"instruction": "a", "output": "b"}'


def check(data: bytes, size: int = 1 << 16, checker: DatasetChecker | None = None) -> DatasetReport:
    checker = checker or DatasetChecker()
    for start in range(0, len(data), size):
        checker.feed(data[start : start + size])
    return checker.finish()


def errors_of(data: bytes, size: int = 1 << 16) -> list[tuple[int, str, str]]:
    with pytest.raises(InvalidDataset) as refused:
        check(data, size)
    return [(error["line"], error["path"], error["code"]) for error in refused.value.errors]


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        ("{}", "", "unknown_form"),
        ('{"instruction": "a", "output": ""}', "output", "blank"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages", "nothing_to_learn"),
    ],
)
def test_the_rows_around_a_bad_one_are_read(row: str, path: str, code: str) -> None:
    assert errors_of(b"%b\n%b\n%b" % (GOOD, row.encode(), GOOD)) == [(2, path, code)]
    assert errors_of(b"[%b,\n%b,\n%b]" % (GOOD, row.encode(), GOOD)) == [(2, path, code)]


LINES = {
    "cut in the middle": (b'{"instruction": "a", "outp', "invalid_json"),
    "not JSON": (b"instruction: a", "invalid_json"),
    "single quotes": (b"{'instruction': 'a'}", "invalid_json"),
    "two values": (GOOD + b" " + GOOD, "invalid_json"),
    "trailing comma": (GOOD + b",", "invalid_json"),
    "NaN": (b'{"instruction": "a", "output": "b", "x": NaN}', "invalid_number"),
    "Infinity": (b'{"instruction": "a", "output": "b", "x": -Infinity}', "invalid_number"),
    "a number of 5,000 digits": (b'{"instruction": "a", "output": "b", "x": ' + b"9" * 5000 + b"}", "invalid_number"),
    "a key twice": (b'{"instruction": "a", "instruction": "c", "output": "b"}', "duplicate_key"),
    "a key twice, inside": (b'{"instruction": "a", "output": "b", "x": {"y": 1, "y": 2}}', "duplicate_key"),
    "control character": (b'{"instruction": "a\x01", "output": "b"}', "invalid_json"),
    "Latin-1": (b'{"instruction": "caf\xe9", "output": "b"}', "invalid_encoding"),
    "overlong UTF-8": (b'{"instruction": "\xc0\xaf", "output": "b"}', "invalid_encoding"),
    "encoded surrogate": (b'{"instruction": "\xed\xa0\x80", "output": "b"}', "invalid_encoding"),
    "escaped lone surrogate": (b'{"instruction": "\\ud800", "output": "b"}', "invalid_text"),
    "escaped NUL": (b'{"instruction": "a\\u0000", "output": "b"}', "invalid_text"),
    "nested 1,000 deep": (b'{"instruction": "a", "output": "b", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}", None),
    "nested 100,000 deep": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("size", [7, 1 << 16])
def test_bad_lines_are_named_and_the_others_still_read(name: str, size: int) -> None:
    line, code = LINES[name]
    data = b"%b\n%b\n{}\n%b\n" % (GOOD, line, GOOD)
    if size == 7 and len(data) > 10_000:
        size = 997
    expected = [(3, "", "unknown_form")]
    found = errors_of(data, size)
    if code is None:
        # Python's own limit decides whether it is read; neither answer is an accident.
        assert found in (expected, [(2, "", "too_deep"), *expected])
    else:
        path = "instruction" if code == "invalid_text" else ""
        assert found == [(2, path, code), *expected]


ARRAYS = {
    "invalid UTF-8 in the middle": (b'[%b,\n{"instruction": "caf\xe9", "output": "b"}, %b]', 2, "invalid_encoding"),
    "invalid UTF-8 lines below": (b'[%b,\n{"instruction": "a",\n"output": "\xff"}, %b]', 3, "invalid_encoding"),
    "invalid UTF-8 between rows": (b"[%b,\n\xff %b]", 2, "invalid_encoding"),
    "a character cut off by the end": (b'[%b,\n%b, {"instruction": "\xe2\x82', 2, "invalid_encoding"),
    "not closed": (b"[%b,\n%b", 2, "invalid_json"),
    "cut in the middle": (b'[%b,\n%b, {"instr', 2, "invalid_json"),
    "no comma": (b"[%b\n%b]", 2, "invalid_json"),
    "trailing comma": (b"[%b,\n%b,]", 2, "invalid_json"),
    "text after it": (b"[%b,%b]\nx", 2, "invalid_json"),
    "a second array": (b"[%b,%b]\n[]", 2, "invalid_json"),
    "lines inside": (b"[%b\n,\n%b\n{}", 4, "invalid_json"),
    "NaN": (b"[%b,\n%b, NaN]", 2, "invalid_number"),
    "duplicate key": (b'[%b,\n%b, {"a": 1, "a": 2}]', 2, "duplicate_key"),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("size", [1, 1 << 16])
def test_what_is_wrong_inside_an_array_has_its_line(name: str, size: int) -> None:
    pattern, line, code = ARRAYS[name]
    assert errors_of(pattern % (GOOD, GOOD), size) == [(line, "", code)]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"\n \r\n\t\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"[]", "empty"),
        (b" [ \n ] ", "empty"),
        ("{}".encode("utf-16"), "invalid_encoding"),
        ("{}".encode("utf-16-be"), "invalid_json"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "invalid_encoding"),
        (b"PK\x03\x04 archive", "invalid_json"),
        (b"PAR1\x15\x04", "invalid_json"),
        (b"instruction,output\na,b\n", "invalid_json"),
        (b'"just text"', "not_an_object"),
    ],
)
def test_files_that_are_no_datasets(data: bytes, code: str) -> None:
    for size in (1, 1 << 16):
        assert errors_of(data, size)[0][2] == code


def test_a_byte_order_mark_and_any_line_end_are_fine() -> None:
    for end in (b"\n", b"\r\n", b"\n\n"):
        assert check(b"\xef\xbb\xbf" + end.join([GOOD] * 3)).rows == 3


def test_one_file_has_one_form() -> None:
    other = b'{"prompt": "a", "completion": "b"}'
    assert errors_of(GOOD + b"\n" + other + b"\n" + other) == [(2, "", "mixed_forms"), (3, "", "mixed_forms")]


def test_no_more_than_a_hundred_errors_are_reported_and_reading_stops() -> None:
    with pytest.raises(InvalidDataset) as refused:
        check(b"{}\n" * 10_000, size=30)
    assert len(refused.value.errors) == MAX_REPORTED_ERRORS
    assert refused.value.total == MAX_REPORTED_ERRORS + 1
    assert refused.value.errors[-1]["line"] == MAX_REPORTED_ERRORS


@pytest.mark.parametrize("head", [b"", b"["])
def test_an_endless_row_is_refused_while_it_streams(head: bytes) -> None:
    checker = DatasetChecker()
    checker.feed(head + GOOD + (b",\n" if head else b"\n") + b'{"instruction": "')
    for _ in range(MAX_ROW_BYTES // 65_536 - 1):
        checker.feed(b"x" * 65_536)
    with pytest.raises(InvalidDataset) as refused:
        checker.feed(b"x" * 65_536)
    assert [(error["line"], error["code"]) for error in refused.value.errors] == [(2, "row_too_long")]


def test_the_longest_row_is_taken_and_one_byte_more_is_not() -> None:
    spare = MAX_ROW_BYTES - len(GOOD)
    longest = GOOD.replace(b'"b"', b'"b' + b"x" * spare + b'"')
    assert len(longest) == MAX_ROW_BYTES
    assert check(longest + b"\n" + longest).rows == 2
    assert check(b"[" + longest + b"," + longest + b"]").rows == 2
    too_long = longest.replace(b'"bx', b'"bxx', 1)
    for data in (GOOD + b"\n" + too_long + b"\n" + GOOD, b"[" + GOOD + b",\n" + too_long + b"," + GOOD + b"]"):
        assert errors_of(data) == [(2, "", "row_too_long")]


def test_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\n".join(
        b'{"instruction": "%d", "output": "%b"}' % (n % 50, b"x" * 100 * (n % 2) + b"y") for n in range(60)
    )
    report = check(data)
    assert (report.format, report.rows, report.duplicates) == ("instruction", 60, 10)
    assert report.length_histogram == [{"up_to": 64, "rows": 30}, {"up_to": 128, "rows": 30}]
    prompt_first, facts, duplicates = report.warnings
    assert "fewer than 100 rows, a better prompt may do as well" in prompt_first
    assert "facts that change belong in retrieval" in facts
    assert "10 rows are exact duplicates" in duplicates
    few = "a model learns little from fewer than 50 rows; this file has 1"
    assert check(GOOD).warnings == [few, prompt_first, facts]
    assert check(b"\n".join(b'{"instruction": "%d", "output": "y"}' % n for n in range(100))).warnings == []
    # Bounded memory: past the limit new rows are no longer remembered.
    monkeypatch.setattr(checking, "MAX_ROWS_COMPARED", 5)
    assert check(data).duplicates <= 10


def test_a_huge_row_lands_in_the_last_bin() -> None:
    report = check(GOOD.replace(b'"b"', b'"' + b"x" * 40_000 + b'"'))
    assert report.length_histogram == [{"up_to": None, "rows": 1}]


def test_a_checked_file_reads_as_examples_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(GOOD + b"\n" + GOOD)
    assert list(read_examples(path)) == [Instruction("a", "b")] * 2
    path.write_bytes(GOOD + b"\n{}")
    with pytest.raises(InvalidDataset, match="line 2"):
        list(read_examples(path))


def test_bad_rows_are_skipped_if_that_is_asked_for_and_told_by_line() -> None:
    """Everybody's copy of Alpaca has 28 rows with an empty output."""
    kept: list[object] = []
    lines = [b'{"instruction": "%d", "output": "%b"}' % (n, b"" if n % 17 == 5 else b"y") for n in range(200)]
    bad = [n + 1 for n in range(200) if n % 17 == 5]
    checker = DatasetChecker(skip_bad_rows=True, keep=kept.append)
    checker.feed(b"\n".join([*lines, b"no JSON", b'{"prompt": "a", "completion": "b"}']))
    report = checker.finish()
    assert (report.rows, report.skipped_rows, len(kept)) == (200 - len(bad), len(bad) + 2, 200 - len(bad))
    codes = [(entry["line"], entry["code"]) for entry in report.skipped]
    assert codes == [*((line, "blank") for line in bad), (201, "invalid_json"), (202, "mixed_forms")]
    assert report.warnings[0] == f"{len(bad) + 2} bad rows were skipped (lines {', '.join(map(str, bad))}, …)"
    # Without being asked for it, they are refused, and the refusal says how to ask.
    assert len(errors_of(b"\n".join(lines))) == len(bad)
    with pytest.raises(InvalidDataset, match="on_bad_rows=skip leaves such rows out"):
        check(b"\n".join(lines))


def test_of_many_skipped_rows_the_first_hundred_are_named() -> None:
    checker = DatasetChecker(skip_bad_rows=True)
    checker.feed(b"{}\n" * 5000 + GOOD)
    report = checker.finish()
    assert (report.rows, report.skipped_rows, len(report.skipped)) == (1, 5000, MAX_REPORTED_ERRORS)


@pytest.mark.parametrize(
    "data", [b"{}\n{}", b"", b"[%b, {]" % GOOD, b"[%b, {}" % GOOD, GOOD + b'\n"' + b"x" * MAX_ROW_BYTES]
)
def test_what_cannot_be_skipped_is_refused(data: bytes) -> None:
    """No good row at all, or one behind which nothing can be trusted."""
    for checker in (DatasetChecker(skip_bad_rows=True), DatasetChecker()):
        with pytest.raises(InvalidDataset) as refused:
            check(data, checker=checker)
        assert "on_bad_rows" not in refused.value.message


def test_what_a_keeper_refuses_is_a_bad_row() -> None:
    def refuse(value: object) -> None:
        raise RowError("", "row_too_long", "too long")

    checker = DatasetChecker(skip_bad_rows=True, keep=refuse)
    checker.feed(GOOD)
    with pytest.raises(InvalidDataset, match="too long"):
        checker.finish()


def test_unused_keys_are_named_once_with_their_rows() -> None:
    rows = [b'{"instruction": "%d", "output": "y", "id": %d, "k%d": 1}' % (n, n, n) for n in range(100)]
    (warning,) = check(b"\n".join(rows)).warnings
    assert warning.startswith("keys that are not learnt from: 'id' (100 rows), 'k0' (1 rows), ")
    assert warning.endswith(" and 89 more")
