"""The loss mask: ids and supervision of examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.datasets.loss_mask import masked_tokens
from shared.datasets.templates import InstructionTemplate, Lesson, Prompt, Turn
from shared.datasets.tokens import Tokenizer
from tests.shared.datasets.bos_tokenizer import write_bos_tokenizer


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_bos_tokenizer(tmp_path_factory.mktemp("tokens")))


turns = st.lists(
    st.builds(
        Turn,
        st.builds(Prompt, st.text(max_size=20), st.booleans()),
        st.builds(Prompt, st.text(max_size=20), st.just(False)),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def lesson(prompt: Prompt, response: str) -> Lesson:
    return Lesson((Turn(prompt, Prompt(response, False)),))


@given(turns=turns, length=st.integers(1, 80), on_prompt=st.booleans())
def test_ids_and_supervision_of_an_example(ours: Tokenizer, turns: list[Turn], length: int, on_prompt: bool) -> None:
    ids: list[int] = []
    marks: list[bool] = []
    for turn in turns:
        prompt = ours.encode_prompt(turn.prompt)
        response = ours.encode(turn.response.text, add_special_tokens=False)
        response += [] if turn.ended else [ours.eos_id]
        ids += prompt + response
        marks += [on_prompt] * len(prompt) + [turn.supervised] * len(response)
    marks[:1] = [False]
    tokens = masked_tokens(ours, Lesson(tuple(turns)), max_length=length, train_on_prompt=on_prompt)
    if not any(marks[:length]):
        assert tokens is None
        return
    assert tokens is not None
    assert (tokens.ids, tokens.supervised) == (ids[:length], marks[:length])
    assert tokens.cut == (len(ids) > length)
    assert tokens.supervised_count == sum(marks[:length])


def test_eos_is_supervised_by_place_and_not_by_id(ours: Tokenizer) -> None:
    """The end of an answer counts; the same id inside a prompt does not, though pad = eos."""
    tokens = masked_tokens(ours, lesson(Prompt("a<|im_end|>b"), "c"), max_length=100)
    assert tokens is not None
    assert tokens.ids.count(ours.eos_id) == 2
    assert [mark for token, mark in zip(tokens.ids, tokens.supervised, strict=True) if token == ours.eos_id] == [
        False,
        True,
    ]


def test_a_served_prompt_is_the_trained_prompt(ours: Tokenizer) -> None:
    prompt = InstructionTemplate().instruction("What?", "x")
    tokens = masked_tokens(ours, lesson(prompt, "That."), max_length=500)
    assert tokens is not None
    served = ours.encode_prompt(prompt)
    assert tokens.ids[: len(served)] == served
    assert not any(tokens.supervised[: len(served)])
    assert all(tokens.supervised[len(served) :])
