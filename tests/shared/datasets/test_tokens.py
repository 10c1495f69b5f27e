"""Tokens without transformers, equal to transformers'; and what is supervised."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from shared.datasets.templates import InstructionTemplate, Prompt, Turn
from shared.datasets.tokens import Tokenizer
from shared.errors import ArtifactCorrupt
from tests.tiny import write_tiny_model

ANY_TEXT = st.text(max_size=60) | st.sampled_from(["<|im_end|>", "a <|im_start|> b", "  ", "\n\n", "🎉äöü你好"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer, which like Llama's writes BOS when special tokens are added."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tokens") / "model")
    path = str(folder / "tokenizer.json")
    fast = FastTokenizer.from_file(path)
    fast.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", fast.token_to_id("<|im_start|>"))]
    )
    fast.save(path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@given(text=ANY_TEXT, special=st.booleans())
def test_ids_are_transformers(ours: Tokenizer, theirs: Any, text: str, special: bool) -> None:
    assert ours.encode(text, add_special_tokens=special) == theirs(text, add_special_tokens=special)["input_ids"]


@given(ids=st.lists(st.integers(0, 390), max_size=30), skip=st.booleans())
def test_texts_are_transformers(ours: Tokenizer, theirs: Any, ids: list[int], skip: bool) -> None:
    ids = [token % ours.vocabulary for token in ids]
    expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_facts(ours: Tokenizer, theirs: Any) -> None:
    assert ours.eos_id == theirs.eos_token_id
    assert ours.stop_ids == {2, 0}
    assert ours.vocabulary == len(theirs)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.chat is not None
    prompt = Prompt(theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt(prompt) == expected


turns = st.lists(
    st.builds(Turn, st.builds(Prompt, st.text(max_size=20), st.booleans()), st.text(max_size=20), st.booleans()),
    min_size=1,
    max_size=4,
)


@given(turns=turns, length=st.integers(1, 80), on_prompt=st.booleans())
def test_ids_and_supervision_of_an_example(ours: Tokenizer, turns: list[Turn], length: int, on_prompt: bool) -> None:
    ids: list[int] = []
    marks: list[bool] = []
    for turn in turns:
        prompt = ours.encode_prompt(turn.prompt)
        response = [*ours.encode(turn.response, add_special_tokens=False), ours.eos_id]
        ids += prompt + response
        marks += [on_prompt] * len(prompt) + [turn.learnt] * len(response)
    marks[0] = False
    tokens = ours.encode_turns(turns, max_length=length, train_on_prompt=on_prompt)
    if not any(marks[:length]):
        assert tokens is None
        return
    assert tokens is not None
    assert (tokens.ids, tokens.supervised) == (ids[:length], marks[:length])
    assert tokens.supervised_count == sum(marks[:length])


def test_eos_is_supervised_by_place_and_not_by_id(ours: Tokenizer) -> None:
    """The end of an answer counts; the same id inside a prompt does not, though pad = eos."""
    tokens = ours.encode_turns([Turn(Prompt("a<|im_end|>b"), "c")], max_length=100)
    assert tokens is not None
    assert tokens.ids.count(ours.eos_id) == 2
    assert [mark for token, mark in zip(tokens.ids, tokens.supervised, strict=True) if token == ours.eos_id] == [
        False,
        True,
    ]


def test_a_served_prompt_is_the_trained_prompt(ours: Tokenizer) -> None:
    prompt = InstructionTemplate().instruction("What?", "x")
    tokens = ours.encode_turns([Turn(prompt, "That.")], max_length=500)
    assert tokens is not None
    served = ours.encode_prompt(prompt)
    assert tokens.ids[: len(served)] == served
    assert not any(tokens.supervised[: len(served)])
    assert all(tokens.supervised[len(served) :])


@pytest.mark.parametrize("defect", ["missing", "no json", "no eos", "no config"])
def test_broken_folders_are_corrupt(folder: Path, tmp_path: Path, defect: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if defect == "missing":
        (tmp_path / "tokenizer.json").unlink()
    elif defect == "no json":
        (tmp_path / "tokenizer.json").write_text("{")
    elif defect == "no config":
        (tmp_path / "tokenizer_config.json").unlink()
    else:
        (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ArtifactCorrupt):
        Tokenizer(tmp_path)
