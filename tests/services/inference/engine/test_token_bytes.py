"""Bytes of tokens, joined, are the text: over both ways in which vocabularies write them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from services.inference.engine.text import Detokenizer
from services.inference.engine.token_bytes import TokenBytes
from shared.datasets.tokens import Tokenizer
from tests.services.inference.harness import Tiny


@pytest.fixture(scope="module")
def byte_level(tiny: Tiny) -> Tokenizer:
    return tiny.load().tokenizer


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2 and TinyLlama write their vocabulary: spaces as `▁`, unknown characters by byte, and its decoder."""
    folder = tmp_path_factory.mktemp("fallback")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "a", "b", "▁a", "▁b", "é"):
        vocabulary[piece] = len(vocabulary)
    fast = FastTokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], byte_fallback=True, unk_token="<unk>")
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    fast.add_tokens([AddedToken("<think>")])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    return Tokenizer(Path(folder))


def rebuilt(own: TokenBytes, ids: list[int]) -> bytes:
    return b"".join(own.of(token, first=not place) for place, token in enumerate(ids))


@given(text=st.text(max_size=40))
@settings(max_examples=50)
def test_byte_level_tokens_rebuild_their_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    special = byte_level.decode(ids) != text
    assert special or rebuilt(TokenBytes(byte_level), ids) == text.encode()


@given(text=st.text("ab é你🎉<think>", min_size=1, max_size=20))
def test_tokens_with_byte_fallback_rebuild_what_is_streamed(byte_fallback: Tokenizer, text: str) -> None:
    ids = byte_fallback.encode(text, add_special_tokens=False)
    stream = Detokenizer(byte_fallback)
    streamed = "".join(stream.push(token) for token in ids) + stream.flush()
    assert rebuilt(TokenBytes(byte_fallback), ids) == streamed.encode()


def test_parts_of_a_character_have_bytes_and_no_name(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, byte_fallback):
        own = TokenBytes(tokenizer)
        ids = tokenizer.encode("🦆", add_special_tokens=False)[-4:]
        assert b"".join(own.of(token) for token in ids) == "🦆".encode()
        assert own.name(ids[-1]) is None
        assert own.of(ids[-1]) == "🦆".encode()[-1:]


def test_control_tokens_have_a_name_and_no_bytes(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, byte_fallback):
        own = TokenBytes(tokenizer)
        assert own.of(tokenizer.eos_id) == b""
        assert own.name(tokenizer.eos_id) == tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
        assert own.of(1 << 20) == b""
    own = TokenBytes(byte_fallback)
    [think] = byte_fallback.encode("<think>", add_special_tokens=False)
    assert (own.of(think), own.name(think)) == (b"<think>", "<think>")
