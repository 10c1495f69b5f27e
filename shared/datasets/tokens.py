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

# Of most texts and tokenizers; a first guess.
_CHARACTERS_PER_TOKEN = 8
_UNSETTLED_WORDS = 2


class Tokenizer:
    """A base model's tokenizer, read from its prepared folder.

    Attributes:
        eos_id: ends every trained response.
        begin_id: begins a text; `eos_id` where there is no token for that.
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
        bos_id = self.fast.token_to_id(bos)
        self.begin_id: int = eos_id if bos_id is None else bos_id
        self.stop_ids = frozenset({eos_id, *_generation_eos(folder)})
        self.chat = _chat_template(folder, config, bos, eos)

    @property
    def vocabulary(self) -> int:
        return self.fast.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool, at_most: int | None = None) -> list[int]:
        """The ids of a text.

        Args:
            at_most: only so many are wanted: of a long text no more is encoded than they need, where its rest cannot
                change them.
        """
        if at_most is not None:
            size = max(at_most, 64) * _CHARACTERS_PER_TOKEN
            while self._splits_into_words and size < len(text):
                first = self._first(text, size, at_most, add_special_tokens)
                if first is not None:
                    return first
                size *= 2
        ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids[:at_most]

    def _first(self, text: str, size: int, wanted: int, add_special_tokens: bool) -> list[int] | None:
        """The first ids of a text by its first `size` characters; None if what comes after these may change them."""
        encoding = self.fast.encode(text[:size], add_special_tokens=add_special_tokens)
        if len(encoding.ids) <= wanted:
            return None
        words = encoding.word_ids
        last, last_wanted = max((w for w in words if w is not None), default=0), words[wanted - 1]
        # Words are told apart by looking at the next character. An added token that was cut in two may have become
        # several words.
        settled = encoding.offsets[wanted - 1][1] <= size - self._longest_added_token
        if last_wanted is None or last_wanted > last - _UNSETTLED_WORDS or not settled:
            return None
        return list(encoding.ids[:wanted])

    @cached_property
    def _splits_into_words(self) -> bool:
        # A normaliser may look further than a word. Added tokens that eat spaces do.
        added = self.fast.get_added_tokens_decoder().values()
        return (
            self.fast.normalizer is None
            and self.fast.pre_tokenizer is not None
            and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        )

    @cached_property
    def _longest_added_token(self) -> int:
        return max((len(token.content) for token in self.fast.get_added_tokens_decoder().values()), default=0)

    def encode_prompt(self, prompt: Prompt, *, at_most: int | None = None) -> list[int]:
        """The ids a request starts from; the very ids its training examples started with."""
        return self.encode(prompt.text, add_special_tokens=prompt.add_special_tokens, at_most=at_most)

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, told without encoding it; 0 where that cannot be told."""
        if not self._longest_token:
            return 0
        # Bytes that the vocabulary lacks become no token at all.
        return len(text.encode().translate(None, delete=self._lacking_bytes)) // self._longest_token

    @cached_property
    def _lacking_bytes(self) -> bytes:
        vocabulary = self.fast.get_vocab(with_added_tokens=False)
        return bytes(byte for byte, written in enumerate(bytes_as_written()) if written not in vocabulary)

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


def bytes_as_written() -> list[str]:
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
