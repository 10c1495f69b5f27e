"""Tokens without transformers, equal to transformers'."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from shared.datasets.templates import Prompt
from shared.datasets.tokens import Tokenizer, bytes_as_written
from shared.errors import ArtifactCorrupt
from tests.shared.datasets.bos_tokenizer import write_bos_tokenizer

ANY_TEXT = st.text(max_size=60) | st.sampled_from(["<|im_end|>", "a <|im_start|> b", "  ", "\n\n", "🎉äöü你好"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bos_tokenizer(tmp_path_factory.mktemp("tokens"))


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


PIECES = st.sampled_from(
    [
        "the ",
        "cat",
        " ",
        "  ",
        "\n",
        " \n",
        "<|im_end|>",
        "<|im_",
        "end|>",
        "'s",
        "12345",
        "é",
        "e\u0301",
        "🎉",
        "a" * 90,
    ]
)


@given(pieces=st.lists(PIECES, min_size=1, max_size=60), times=st.integers(1, 80), wanted=st.integers(1, 300))
def test_the_first_ids_of_a_long_text_are_those_of_the_whole(
    ours: Tokenizer, pieces: list[str], times: int, wanted: int
) -> None:
    text = "".join(pieces) * times
    for special in (False, True):
        whole = ours.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special, at_most=wanted) == whole[:wanted]


def test_of_a_long_text_no_more_is_encoded_than_is_wanted(ours: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(fast, name)

        def encode(self, text: str, **options: Any) -> Any:
            sizes.append(len(text))
            return fast.encode(text, **options)

    fast = ours.fast
    monkeypatch.setattr(ours, "fast", Counting())
    assert len(ours.encode("some words " * 100_000, add_special_tokens=True, at_most=512)) == 512
    assert sum(sizes) < 20_000


def test_facts(ours: Tokenizer, theirs: Any) -> None:
    assert ours.eos_id == theirs.eos_token_id
    assert ours.stop_ids == {2, 0}
    assert ours.vocabulary == len(theirs)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.chat is not None
    prompt = Prompt(theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False, "template")
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt(prompt) == expected


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
    message = "has no EOS token" if defect == "no eos" else "no readable tokenizer"
    with pytest.raises(ArtifactCorrupt, match=f"{tmp_path.name}: .*{message}"):
        Tokenizer(tmp_path)


def byte_level(folder: Path, *, normaliser: bool = False, eats_spaces: bool = False, without: str = "") -> Tokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    if normaliser:
        fast.normalizer = normalizers.NFKC()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trainer.initial_alphabet = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in without]
    fast.train_from_iterator(["the cat sat on the mat and the dog sat on the cat", "        \n\n"] * 20, trainer)
    fast.add_special_tokens([AddedToken("<|a rather long end of text|>", special=True, rstrip=eats_spaces)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|a rather long end of text|>"}')
    return Tokenizer(folder)


# As byte-level vocabularies write the bytes of "é"; some models lack rare ones.
LACKING = "Ã©"


@pytest.fixture(scope="module", params=["", LACKING])
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tokenizer:
    return byte_level(tmp_path_factory.mktemp("byte-level"), without=request.param)


def test_bytes_are_written_as_the_library_writes_them() -> None:
    assert set(bytes_as_written()) == set(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, range(0x250))) + "漢😀"
    ((written, _),) = level.pre_tokenize_str(text)
    assert written == "".join(bytes_as_written()[byte] for byte in text.encode())


def test_bytes_that_a_vocabulary_lacks_become_no_token(tmp_path: Path) -> None:
    lacking = byte_level(tmp_path, without=LACKING)
    assert lacking.encode("é" * 100, add_special_tokens=False) == []
    assert lacking.fewest_tokens("é" * 100_000) == 0
    assert lacking.fewest_tokens("a" * 100_000) > 1000


@given(st.lists(st.sampled_from(["the cat", " ", "é", "漢", "😀", "\n\n", "<|a rather long end of text|>", "x" * 50])))
def test_a_text_has_at_least_the_fewest_tokens(bytes_tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    assert bytes_tokenizer.fewest_tokens(text) <= len(bytes_tokenizer.encode(text, add_special_tokens=False))


def test_the_fewest_tokens_are_told_where_they_can_be(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert bytes_tokenizer.fewest_tokens("a" * 10_000) >= 10_000 // 40
    assert byte_level(tmp_path, normaliser=True).fewest_tokens("a" * 10_000) == 0
    assert byte_level(tmp_path, eats_spaces=True).fewest_tokens("a" * 10_000) == 0
