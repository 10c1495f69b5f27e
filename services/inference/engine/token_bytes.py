"""Which bytes of text each token stands for, so that tokens which are parts of a character can be put together again.

Byte-level vocabularies write a byte as a character, those with byte fallback as `<0xE4>`; `tokenizers` decodes both to
text only, in which half a character is U+FFFD. Knows no requests and no tensors.
"""

import json
import re
from functools import cached_property
from typing import Any

from shared.datasets.tokens import Tokenizer, bytes_as_written

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._fast = tokenizer.fast
        self._added = {
            id_: (token.content, token.special) for id_, token in self._fast.get_added_tokens_decoder().items()
        }

    def of(self, token: int, *, first: bool = False) -> bytes:
        """The bytes of text that a token stands for; none for special tokens, which are no text.

        Args:
            first: of a text, where some tokenizers leave out the space that their first word is written with.
        """
        if token in self._added:
            content, special = self._added[token]
            return b"" if special else content.encode()
        piece: str | None = self._fast.id_to_token(token)
        if piece is None:
            return b""
        if self._bytes is not None:
            return bytes(self._bytes[character] for character in piece if character in self._bytes)
        if self._falls_back and (match := _FALLBACK.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        if self._space:
            text = piece.replace(self._space, " ")
            return (text.removeprefix(" ") if first and self._strips else text).encode()
        decoded: str = self._fast.decode([token])
        return decoded.encode()

    def name(self, token: int) -> str | None:
        """A token as text, special ones too; None if its bytes alone are no UTF-8."""
        if token in self._added:
            return self._added[token][0]
        try:
            return self.of(token).decode()
        except UnicodeDecodeError:
            return None

    @cached_property
    def _decoders(self) -> list[dict[str, Any]]:
        if self._fast.decoder is None:
            return []
        decoder: dict[str, Any] = json.loads(self._fast.decoder.__getstate__())
        return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]

    @cached_property
    def _bytes(self) -> dict[str, int] | None:
        if not any(each["type"] == "ByteLevel" for each in self._decoders):
            return None
        return {written: byte for byte, written in enumerate(bytes_as_written())}

    @cached_property
    def _falls_back(self) -> bool:
        return any(each["type"] == "ByteFallback" for each in self._decoders)

    @cached_property
    def _space(self) -> str:
        """What the vocabulary writes for a space; empty if it writes none."""
        for each in self._decoders:
            if each["type"] == "Metaspace":
                return str(each["replacement"])
            if each["type"] == "Replace" and each["content"] == " ":
                return str(each["pattern"].get("String", ""))
        return ""

    @cached_property
    def _strips(self) -> bool:
        return any(
            (each["type"] == "Strip" and each["content"] == " " and each["start"])
            or (each["type"] == "Metaspace" and each.get("prepend_scheme") != "never")
            for each in self._decoders
        )
