"""Streamed text: joined pieces are the whole, no half characters, stop strings found wherever the tokens break."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from services.inference.engine.text import Detokenizer, StopFinder
from shared.datasets.tokens import Tokenizer
from tests.services.inference.harness import Tiny


@pytest.fixture(scope="session")
def tokenizer(tiny: Tiny) -> Tokenizer:
    return Tokenizer(tiny.store.base("tiny"))


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@given(text=st.text(max_size=40))
def test_pieces_of_real_text_join_to_it(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    # The byte-level vocabulary has every byte: nothing is lost, and no piece holds half a character.
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_pieces_of_any_ids_join_to_what_they_decode_to(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = [token % tokenizer.vocabulary for token in ids]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


WORDS = ["▁", "a", "b", "ab", "▁a", "▁b", "▁ab", "e", "l", "o", "lo", "▁h", "▁hel", "h", "el", "\u0301"]


class SentencePieceLike:
    """Words with a leading "▁", and byte fallback for everything else, as Llama 2's and Mistral's tokenizers decode."""

    def __init__(self) -> None:
        names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
        merges = [("a", "b"), ("▁", "a"), ("▁", "b"), ("▁", "ab"), ("e", "l"), ("l", "o"), ("▁", "h"), ("▁h", "el")]
        vocabulary = {name: number for number, name in enumerate(names)}
        self.fast = FastTokenizer(models.BPE(vocabulary, merges, unk_token="<s>", byte_fallback=True))
        self.fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        self.fast.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self.fast.add_special_tokens(["<s>", "</s>"])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.fast.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.fast.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


SENTENCE_PIECES = SentencePieceLike()


@given(text=st.text(max_size=30) | st.text(alphabet="abelo h🎉é你👩\u200d\u0301", max_size=30))
def test_byte_fallback_pieces_join_to_the_text(text: str) -> None:
    ids = SENTENCE_PIECES.encode(text)
    pieces = pieces_of(SENTENCE_PIECES, ids)
    # The tokenizer marks a space as SentencePiece does, so that this one mark cannot come back.
    assert "".join(pieces) == SENTENCE_PIECES.decode(ids) == text.replace("▁", " ")
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(junk=st.lists(st.integers(0, 257), max_size=12), text=st.text(alphabet="abelo h🎉你", min_size=1, max_size=12))
def test_bytes_that_are_no_text_do_not_spoil_what_follows(junk: list[int], text: str) -> None:
    """Byte fallback decodes a run of wrong bytes anew as it grows: characters become U+FFFD after they were emitted."""
    # The word ends the run of bytes.
    ids = [*junk, *SENTENCE_PIECES.encode("hel"), *SENTENCE_PIECES.encode(text)]
    joined = "".join(pieces_of(SENTENCE_PIECES, ids))
    assert joined.endswith("hel " + text)
    # A byte may come out as itself and once more as U+FFFD, not oftener.
    assert len(joined) <= 2 * len(junk) + len(" hel " + text)


@pytest.mark.parametrize("text", ["🎉", "👩‍👩‍👧‍👦", "你好", "é", "🇩🇪🇫🇷"])
def test_an_emoji_of_several_tokens_comes_out_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = [token for byte in text.encode() for token in _byte_token(tokenizer, byte)]
    pieces = pieces_of(tokenizer, ids)
    assert len(ids) == len(text.encode())
    assert [piece for piece in pieces if piece] == list(text)


def _byte_token(tokenizer: Tokenizer, byte: int) -> list[int]:
    """The one token of a byte, found through its printable stand-in in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))
    token = tokenizer.fast.token_to_id(stand_in)
    assert token is not None
    return [token]


@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    keep=st.booleans(),
)
def test_stops_are_found_wherever_the_pieces_break(text: str, stops: list[str], cuts: list[int], keep: bool) -> None:
    finder = StopFinder(stops, keep=keep)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    out = ""
    for start, end in pairwise(edges):
        out += finder.push(text[start:end])
        if finder.found:
            break
    out += finder.flush()
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    if not ends:
        assert (out, finder.found) == (text, None)
        return
    found = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert (out, finder.found) == (text[: ends[0] if keep else ends[0] - len(found)], found)


def test_an_end_that_nobody_asked_for_is_never_passed_on() -> None:
    for keep, shown in [(True, "a##"), (False, "a")]:
        asked = StopFinder(["##"], keep=keep, ends=["\n@"])
        assert [asked.push(piece) for piece in ["a#", "#b"]] == ["a", shown[1:]]
        assert asked.found == "##"
        unasked = StopFinder(["##"], keep=keep, ends=["\n@"])
        assert [unasked.push(piece) for piece in ["a\n", "@b"]] == ["a", ""]
        assert unasked.found == "\n@"


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    finder = StopFinder(["###"], keep=False)
    assert [finder.push(piece) for piece in ["a#", "#", "b", "##", "#"]] == ["a", "", "##b", "", ""]
    assert finder.found
