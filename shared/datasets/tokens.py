"""Text to token ids and back, with `tokenizers` alone: no torch, no transformers, so the gateway can count tokens."""

import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from shared.datasets.templates import ChatTemplate, Prompt
from shared.errors import ArtifactCorrupt


class Tokenizer:
    """A base model's tokenizer, read from its prepared folder.

    Attributes:
        eos_id: ends every trained response.
        stop_ids: every id that ends generation (the generation config may name several).
        chat: the base's chat template, if it has one.

    Raises:
        ArtifactCorrupt: the folder has no `tokenizer.json` or no EOS token.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text())
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactCorrupt(f"{folder.name}: no readable tokenizer: {error}") from error
        self.fast.no_truncation()
        self.fast.no_padding()
        bos, eos = _token(config, "bos_token"), _token(config, "eos_token")
        eos_id = self.fast.token_to_id(eos)
        if eos_id is None:
            raise ArtifactCorrupt(f"{folder.name}: the tokenizer has no EOS token")
        self.eos_id: int = eos_id
        self.stop_ids = frozenset({eos_id, *_generation_eos(folder)})
        self.chat = _chat_template(folder, config, bos, eos)

    @property
    def vocabulary(self) -> int:
        return self.fast.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The ids a request starts from; the very ids its training examples started with."""
        return self.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, told without encoding it; 0 where that cannot be told."""
        if not self._longest_token:
            return 0
        # Bytes that the vocabulary lacks become no token at all.
        return len(text.encode().translate(None, delete=self._lacking_bytes)) // self._longest_token

    @cached_property
    def _lacking_bytes(self) -> bytes:
        vocabulary = self.fast.get_vocab(with_added_tokens=False)
        return bytes(byte for byte, written in enumerate(_bytes_as_written()) if written not in vocabulary)

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of text that one token stands for at most; 0 if there is no such number.

        There is one for byte-level BPE (no normaliser, no token for what is unknown, no added token that eats spaces).
        """
        vocabulary = self.fast.get_vocab(with_added_tokens=False)
        added = self.fast.get_added_tokens_decoder().values()
        if (
            type(self.fast.model).__name__ != "BPE"
            or type(self.fast.decoder).__name__ != "ByteLevel"
            or self.fast.normalizer is not None
            or self.fast.model.unk_token is not None
            or any(token.lstrip or token.rstrip for token in added)
        ):
            return 0
        # A character of a byte-level token stands for a byte.
        return max(*map(len, vocabulary), *(len(token.content.encode()) for token in added), 1)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


def _bytes_as_written() -> list[str]:
    """The character that byte-level vocabularies write for each byte: itself if it can be seen, else one from 256 on.

    As GPT-2's vocabulary began it; `tokenizers` has the set of them, and not which is which.
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = itertools.count(256)
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]


def _token(config: dict[str, Any], key: str) -> str:
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _generation_eos(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    value = json.loads(path.read_text()).get("eos_token_id")
    return [value] if isinstance(value, int) else [v for v in value or [] if isinstance(v, int)]


def _chat_template(folder: Path, config: dict[str, Any], bos: str, eos: str) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    source = path.read_text() if path.is_file() else config.get("chat_template")
    return ChatTemplate(source, bos, eos) if isinstance(source, str) else None
