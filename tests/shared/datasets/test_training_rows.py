"""Rows of tokens: texts are divided and nothing of them is lost; what is too long is cut where it was asked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.datasets.examples import Completion, Example, Instruction, Text, format_of
from shared.datasets.forms import parse_row
from shared.datasets.loss_mask import MaskedTokens, Truncation
from shared.datasets.templates import template_for
from shared.datasets.tokens import Tokenizer
from shared.datasets.training_rows import training_rows
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("rows") / "model"))


def rows_of(
    tokenizer: Tokenizer, example: Example, max_length: int = 512, truncation: Truncation = "cut_end"
) -> list[MaskedTokens]:
    template = template_for(format_of(example), tokenizer.chat, 0)
    return training_rows(tokenizer, template, example, max_length=max_length, truncation=truncation)


def learnt(tokenizer: Tokenizer, row: MaskedTokens) -> str:
    ids = [token for token, supervised in zip(row.ids, row.supervised, strict=True) if supervised]
    return tokenizer.decode(ids, skip_special_tokens=False)


@settings(max_examples=50)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=200), max_length=st.integers(8, 40))
def test_every_token_of_a_text_but_the_first_is_learnt_once(tokenizer: Tokenizer, text: str, max_length: int) -> None:
    rows = rows_of(tokenizer, Text(text), max_length)
    whole = [*tokenizer.encode(text, add_special_tokens=True), tokenizer.eos_id]
    supervised = [t for row in rows for t, s in zip(row.ids, row.supervised, strict=True) if s]
    assert supervised == whole[1:]
    assert all(2 <= len(row.ids) <= max_length and not row.cut for row in rows)
    # Each goes on with the token that the one before ended with.
    assert [row.ids[0] for row in rows[1:]] == [row.ids[-1] for row in rows[:-1]]
    assert len(rows) == max(1, -(-(len(whole) - 1) // (max_length - 1)))


LONG = Completion("What? " * 10, "Because. " * 10)


def test_a_row_that_is_too_long_loses_its_end_or_its_start_or_is_dropped(tokenizer: Tokenizer) -> None:
    (whole,) = rows_of(tokenizer, LONG)
    size = len(whole.ids)
    assert (whole.cut, whole.ids[-1]) == (False, tokenizer.eos_id)
    for truncation in ("cut_end", "cut_start", "drop_row"):
        assert rows_of(tokenizer, LONG, size, truncation) == [whole]
    (first,) = rows_of(tokenizer, LONG, size - 1)
    assert (first.ids, first.supervised, first.cut) == (whole.ids[:-1], whole.supervised[:-1], True)
    (last,) = rows_of(tokenizer, LONG, size - 1, "cut_start")
    assert (last.ids, last.cut) == (whole.ids[1:], True)
    assert last.supervised == [False, *whole.supervised[2:]]
    assert rows_of(tokenizer, LONG, size - 1, "drop_row") == []
    # So short that only the start of the response is left, or nothing of it.
    assert rows_of(tokenizer, LONG, 8) == []
    (end,) = rows_of(tokenizer, LONG, 8, "cut_start")
    assert end.supervised == [False] + [True] * 7


@settings(max_examples=50)
@given(prompt=st.text(max_size=60), answer=st.text(min_size=1, max_size=60), max_length=st.integers(8, 60))
def test_what_is_cut_is_a_part_of_the_whole(tokenizer: Tokenizer, prompt: str, answer: str, max_length: int) -> None:
    (whole,) = rows_of(tokenizer, Completion(prompt, answer), 10_000)
    fits = len(whole.ids) <= max_length
    starts = rows_of(tokenizer, Completion(prompt, answer), max_length)
    ends = rows_of(tokenizer, Completion(prompt, answer), max_length, "cut_start")
    assert all(row.cut != fits and row.ids == whole.ids[:max_length] for row in starts)
    assert all(row.cut != fits and row.ids == whole.ids[-max_length:] for row in ends)
    assert (rows_of(tokenizer, Completion(prompt, answer), max_length, "drop_row") == [whole]) == fits
    assert ends, "the end of an answer can always be learnt"


def test_system_and_history_of_an_instruction_are_learnt_as_they_say(tokenizer: Tokenizer) -> None:
    example = Instruction("Translate", "Katze", "cat", "German only.", (("Translate dog", "Hund"),))
    (row,) = rows_of(tokenizer, example)
    assert tokenizer.decode(row.ids, skip_special_tokens=False) == (
        "### Instruction:\nGerman only.\n\nTranslate dog\n\n### Response:\nHund<|im_end|>\n\n"
        "### Instruction:\nTranslate\n\n### Input:\ncat\n\n### Response:\nKatze<|im_end|>"
    )
    assert learnt(tokenizer, row) == "Hund<|im_end|>Katze<|im_end|>"


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_an_answer_that_is_switched_off_is_not_learnt(tokenizer: Tokenizer, switch: dict[str, object]) -> None:
    bad = {"role": "assistant", "content": "BAD"} | switch
    messages = [{"role": "user", "content": "a"}, bad, {"role": "user", "content": "no"}]
    example = parse_row({"messages": [*messages, {"role": "assistant", "content": "GOOD", "weight": None}]})
    (row,) = rows_of(tokenizer, example)
    assert learnt(tokenizer, row).startswith("GOOD<|im_end|>")
    assert "BAD" in tokenizer.decode(row.ids)
