"""Text to token ids and back, with `tokenizers` alone: no torch, no transformers, so the gateway can count tokens."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors

from shared.datasets.chat_template import ChatTemplate
from shared.datasets.control_tokens import ControlTokens, Encoded, GuardedTokenizer, Span
from shared.datasets.templates import Prompt, Turn
from shared.errors import ArtifactCorrupt

# Of most texts and tokenizers; a first guess.
_CHARACTERS_PER_TOKEN = 8
_UNSETTLED_WORDS = 2
ADDITIONAL_TEMPLATES = "additional_chat_templates"


class Tokenizer:
    """A base model's tokenizer, read from its prepared folder.

    Attributes:
        eos_id: ends every trained response that its template does not end.
        begin_id: begins a text; `eos_id` where there is no token for that.
        control: the control tokens.
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
        self._folder = folder
        _whole_texts(self.fast)
        _count_spaces(self.fast.post_processor)
        special = {key: text for key in config if key.endswith("_token") and (text := _token(config, key))}
        eos_id = self.fast.token_to_id(special.get("eos_token", ""))
        if eos_id is None:
            raise ArtifactCorrupt(f"{folder.name}: the tokenizer has no EOS token")
        self.eos_id: int = eos_id
        bos_id = self.fast.token_to_id(special.get("bos_token", ""))
        self.begin_id: int = eos_id if bos_id is None else bos_id
        sources = chat_templates(folder)
        added = {token.content: token.special for token in self.fast.get_added_tokens_decoder().values()}
        # Many names are special by the configuration alone.
        added |= {text: True for text in special.values() if text in added}
        self.control = ControlTokens(added, "\0".join(sources.values()))
        self.chat = ChatTemplate(sources, special, self.control) if sources else None
        self._stop_ids = frozenset({eos_id, *_generation_eos(folder)})

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every id that ends generation: EOS, those of the generation config, and the chat template's end of turn."""
        end = self.fast.token_to_id(self.chat.end) if self.chat and self.chat.end else None
        return self._stop_ids if end is None else self._stop_ids | {end}

    @cached_property
    def sha256(self) -> str:
        """Of all that makes ids of text, as it was read."""
        fast = FastTokenizer.from_file(str(self._folder / "tokenizer.json"))
        _whole_texts(fast)
        return hashlib.sha256(fast.to_str().encode()).hexdigest()

    @cached_property
    def encodes_parts_as_the_whole(self) -> bool:
        """Whether a text that is cut between words has the ids of the whole: byte-level ones that change no text."""
        return self.fast.normalizer is None and type(self.fast.decoder).__name__ == "ByteLevel"

    @property
    def vocabulary(self) -> int:
        return self.fast.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool, at_most: int | None = None) -> list[int]:
        """The ids of a text in which control tokens are what they say.

        Args:
            at_most: only so many are wanted: of a long text no more is encoded than they need, where its rest cannot
                change them.
        """
        return self._plain(text, add_special_tokens=add_special_tokens, at_most=at_most).ids[:at_most]

    def encoded(self, prompt: Prompt, *, at_most: int | None = None) -> Encoded:
        """A prompt's own text, with the characters of each token; at least the first `at_most` tokens.

        Raises:
            InvalidRequest: see `GuardedTokenizer.encode`.
        """
        literal = self.literal(prompt)
        special = prompt.add_special_tokens
        if literal or (prompt.source != "author" and self._hides_control_tokens):
            return self._guarded.encode(prompt.text, literal, add_special_tokens=special)
        return self._plain(prompt.text, add_special_tokens=special, at_most=at_most)

    def literal(self, prompt: Prompt) -> Sequence[Span]:
        """Where control tokens stand in a prompt's own text that are only text."""
        if prompt.source in ("author", "template"):
            return prompt.literal
        return self.control.spans(prompt.text, special_only=prompt.source == "assistant")

    @cached_property
    def _guarded(self) -> GuardedTokenizer:
        return GuardedTokenizer(self.fast, self.control)

    def _plain(self, text: str, *, add_special_tokens: bool, at_most: int | None) -> Encoded:
        if at_most is not None:
            size = max(at_most, 64) * _CHARACTERS_PER_TOKEN
            while self._splits_into_words and size < len(text):
                first = self._first(text, size, at_most, add_special_tokens)
                if first is not None:
                    return first
                size *= 2
        encoding = self.fast.encode(text, add_special_tokens=add_special_tokens)
        return Encoded(encoding.ids, encoding.offsets)

    def _first(self, text: str, size: int, wanted: int, add_special_tokens: bool) -> Encoded | None:
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
        return Encoded(encoding.ids[:wanted], encoding.offsets[:wanted])

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
    def _hides_control_tokens(self) -> bool:
        """Whether a text may become a control token without containing it: by a normaliser, or by the model itself."""
        names = self.control.all
        normalised = any(
            token.normalized and token.content in names for token in self.fast.get_added_tokens_decoder().values()
        )
        if normalised and self.fast.normalizer is not None:
            return True
        model = self.fast.model
        return type(model).__name__ == "Unigram" and any(text in self._written for text in names)

    @cached_property
    def _written(self) -> frozenset[str]:
        return frozenset(self.fast.get_vocab(with_added_tokens=False))

    @cached_property
    def _longest_added_token(self) -> int:
        return max((len(token.content) for token in self.fast.get_added_tokens_decoder().values()), default=0)

    def encode_prompt(self, prompt: Prompt, *, at_most: int | None = None) -> list[int]:
        """The ids a request starts from; the very ids its training examples started with."""
        ids: list[int] = []
        for turn in prompt.before:
            ids += self.encoded(turn.prompt).ids + self.response_ids(turn)
        return (ids + self.encoded(prompt, at_most=at_most).ids)[:at_most]

    def response_ids(self, turn: Turn, *, at_most: int | None = None) -> list[int]:
        """A response by itself, with one EOS if it has no other end, also where its author has written the end."""
        if turn.ended:
            return self.encoded(turn.response, at_most=at_most).ids[:at_most]
        ids = self.encoded(self._without_end(turn.response), at_most=at_most).ids[:at_most]
        return ids if ids[-1:] == [self.eos_id] else [*ids, self.eos_id]

    def _without_end(self, response: Prompt) -> Prompt:
        text = response.text
        while response.source == "assistant" and (kept := text.rstrip()).endswith(self._ends):
            text = next(kept.removesuffix(end) for end in self._ends if kept.endswith(end))
        return response if text == response.text else replace(response, text=text)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        eos = self.fast.id_to_token(self.eos_id) or ""
        return tuple(end for end in (eos, self.chat.end if self.chat else None) if end)

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


def _whole_texts(fast: FastTokenizer) -> None:
    fast.no_truncation()
    fast.no_padding()


def _count_spaces(processor: Any) -> None:
    """Have a post-processor leave the spaces in a token's characters; some take them out. Changes no ids."""
    if hasattr(processor, "trim_offsets"):
        processor.trim_offsets = False
    elif isinstance(processor, processors.Sequence):
        for index in itertools.count():
            try:
                _count_spaces(processor[index])
            except IndexError:
                break


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model's folder by their names; most have one, `default`.

    As transformers reads them: files come before what `tokenizer_config.json` holds, which may be one text or a list.
    """
    file = folder / "chat_template.jinja"
    sources = {path.stem: path.read_text() for path in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))}
    if file.is_file():
        sources["default"] = file.read_text()
    if sources:
        return sources
    given = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, dict):
        return {str(name): source for name, source in given.items() if isinstance(source, str)}
    named = [each for each in given or [] if isinstance(each, dict)]
    return {str(each.get("name")): each["template"] for each in named if isinstance(each.get("template"), str)}
