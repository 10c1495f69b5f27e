"""Tables and messages on terminals of any width."""

import re

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.layout import message, table

WORDS = st.lists(st.text("abc-:.", min_size=1, max_size=30), min_size=1, max_size=20)


@given(WORDS, st.integers(20, 100))
def test_a_message_is_broken_between_words_only(words: list[str], width: int) -> None:
    lines = message(" ".join(words), width).split("\n")
    assert " ".join(lines).split() == words
    assert all(len(line) <= width or " " not in line for line in lines)
    assert message(" ".join(words), None) == " ".join(words)


@given(st.lists(st.tuples(*[st.text("abc:", min_size=1, max_size=25)] * 4), max_size=5), st.integers(20, 100))
def test_a_table_that_does_not_fit_breaks_no_cell(rows: list[tuple[str, ...]], width: int) -> None:
    header = ("job", "state", "age", "model")
    text = table(header, rows, width)
    longest = max((len(f"  model {cell}") for row in rows for cell in row), default=0)
    assert all(len(line) <= max(width, longest) for line in text.splitlines())
    for row in rows:
        assert all(cell in text for cell in row)
    whole = table(header, rows, None).splitlines()
    assert [re.split(" +", line) for line in whole] == [list(header), *map(list, rows)]


def test_a_narrow_terminal_gets_records() -> None:
    rows = [("ftjob-1", "succeeded", "-", "ft:smollm2-135m-instruct:default:tutrec:ac4fad860e33")]
    assert table(("job", "state", "age", "model"), rows, 60) == (
        "ftjob-1\n  state succeeded\n  model ft:smollm2-135m-instruct:default:tutrec:ac4fad860e33\n"
    )
    assert table(("job", "state"), [("a", "b")], 60) == "job  state\na    b\n"
