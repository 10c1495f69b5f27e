"""Streamed text: joined pieces are the whole, no half characters, stop strings found wherever the tokens break."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine.text import Detokenizer, StopFinder
from shared.datasets.tokens import Tokenizer
from tests.services.inference.harness import Tiny


@pytest.fixture(scope="session")
def tokenizer(tiny: Tiny) -> Tokenizer:
    return Tokenizer(tiny.store.base("tiny"))


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
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
        assert (out, finder.found) == (text, False)
        return
    longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
    assert (out, finder.found) == (text[: ends[0] if keep else ends[0] - longest], True)


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    finder = StopFinder(["###"], keep=False)
    assert [finder.push(piece) for piece in ["a#", "#", "b", "##", "#"]] == ["a", "", "##b", "", ""]
    assert finder.found
