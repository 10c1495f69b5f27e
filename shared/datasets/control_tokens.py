"""Which texts of a tokenizer are control tokens, and how a text is encoded in which some of them are only text.

A tokenizer finds its added tokens wherever their text stands, so a user who writes one would write a control token.
Here it is said where in a text that must not happen. Knows nothing of templates.
"""

import bisect
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from shared.errors import InvalidRequest

Span = tuple[int, int]
"""(start, end) in characters of a text."""

# Many models have control tokens of this shape that are not marked as special.
_SHAPED_LIKE_CONTROL = re.compile(r"<\|.+\|>")
_SHORTEST_NAME = 3


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
        added: the text of each added token, and whether it is special.
        template: the text of the base's chat templates; added tokens that occur there are control tokens too.

    Attributes:
        special: those that only a template may write.
        all: these and those that an assistant may write as well (`<think>`), but nobody else.
    """

    def __init__(self, added: Mapping[str, bool] | None = None, template: str = "") -> None:
        named = {text: special for text, special in (added or {}).items() if text.strip(" \n\t\r▁")}
        self.special = frozenset(text for text, special in named.items() if special)
        self.all = self.special | {
            text
            for text in named
            if len(text) >= _SHORTEST_NAME and (text in template or _SHAPED_LIKE_CONTROL.fullmatch(text))
        }
        self._special, self._all = _any_of(self.special), _any_of(self.all)

    def spans(self, text: str, within: Span | None = None, *, special_only: bool = False) -> list[Span]:
        """Where control tokens stand in a text, as a tokenizer finds them: the first, and of those the longest."""
        start, end = within or (0, len(text))
        pattern = self._special if special_only else self._all
        return [found.span() for found in pattern.finditer(text, start, end)]

    def meant(self, text: str, literal: Sequence[Span]) -> Iterable[Span]:
        """Where control tokens stand in a text that are what they say; `literal` is where they are not."""
        borders = [0, *(border for span in literal for border in span), len(text)]
        for number, within in enumerate(pairwise(borders)):
            if number % 2 == 0:
                yield from self.spans(text, within)

    def fragments(self, text: str) -> list[Span]:
        """Where a text begins or ends with a part of a control token, which its surroundings might complete."""
        starts, ends, inner = self._parts
        if text in inner:
            return [(0, len(text))]
        lengths = range(min(self._longest, len(text)), 0, -1)
        first = next((length for length in lengths if text[:length] in ends), 0)
        last = next((length for length in lengths if text[-length:] in starts), 0)
        if first + last > len(text):
            return [(0, len(text))]
        return [span for span in ((0, first), (len(text) - last, len(text))) if span[0] < span[1]]

    @cached_property
    def _parts(self) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
        """The beginnings of control tokens, their ends, and what stands between."""
        starts = {text[:cut] for text in self.all for cut in range(1, len(text))}
        ends = {text[cut:] for text in self.all for cut in range(1, len(text))}
        inner = {text[a:b] for text in self.all for a in range(1, len(text)) for b in range(a + 1, len(text))}
        return frozenset(starts), frozenset(ends), frozenset(inner)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.all), default=0)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and the characters of the text that each of them stands for."""

    ids: list[int]
    spans: list[Span]


class GuardedTokenizer:
    """A copy of a tokenizer that knows its control tokens by names nobody can write.

    The names are drawn anew for every copy. A text is encoded with the names in the place of the control tokens that
    are meant; what is left of them is text like any other, and is merged with what stands around it.
    """

    def __init__(self, fast: FastTokenizer, control: ControlTokens) -> None:
        data = json.loads(fast.to_str())
        secret = secrets.token_hex(16)
        self._control = control
        self._names = {text: f"control{secret}n{index}z" for index, text in enumerate(sorted(control.all))}
        _rename(data, self._names)
        self._fast = FastTokenizer.from_str(json.dumps(data))
        self._fast.no_truncation()
        self._fast.no_padding()
        # What the model's own vocabulary lacks is numbered anew.
        renumbered = {self._fast.token_to_id(self._names.get(text, text)): id for text, id in _added(fast).items()}
        self._renumbered = {new: id for new, id in renumbered.items() if new != id}
        self._control_ids = {id for text, id in _added(fast).items() if text in control.all}

    def encode(self, text: str, literal: Sequence[Span], *, add_special_tokens: bool) -> Encoded:
        """Encode a text.

        Args:
            literal: where control tokens are only text; ascending, and none overlaps another.

        Raises:
            InvalidRequest: the tokenizer makes a control token of what is only text.
        """
        written: list[str] = []
        # (start in what is written, start in the text), and the same of what follows each name.
        moved: list[Span] = [(0, 0)]
        size = done = tokens = 0
        for start, end in self._control.meant(text, literal):
            name = self._names[text[start:end]]
            written += [text[done:start], name]
            size += start - done
            moved.append((size, start))
            size += len(name)
            moved.append((size, end))
            done, tokens = end, tokens + 1
        written.append(text[done:])
        encoding = self._fast.encode("".join(written), add_special_tokens=add_special_tokens)
        ids = [self._renumbered.get(id, id) for id in encoding.ids]
        of_text = zip(ids, encoding.special_tokens_mask, strict=True)
        if sum(id in self._control_ids and not outside for id, outside in of_text) != tokens:
            raise InvalidRequest("this model's tokenizer cannot take control tokens for text", param="messages")
        places = [place for place, _ in moved]

        def original(place: int) -> int:
            there, here = moved[bisect.bisect_right(places, place) - 1]
            return here + place - there

        return Encoded(ids, [(original(start), original(end)) for start, end in encoding.offsets])


def _added(fast: FastTokenizer) -> dict[str, int]:
    return {token.content: id for id, token in fast.get_added_tokens_decoder().items()}


def _rename(data: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens in `tokenizer.json`; no merge makes one of them any more."""
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = data["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): id for text, id in vocabulary.items()}
    elif vocabulary:
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if _kept(pair, names)]


def _kept(pair: str | list[str], names: Mapping[str, str]) -> bool:
    first, second = pair.split(" ", 1) if isinstance(pair, str) else pair
    return first not in names and second not in names and first + second not in names
