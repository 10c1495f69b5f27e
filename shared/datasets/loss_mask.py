"""The loss mask: the token ids of a training example, and which of them are supervised.

Supervised are the response and its end; they are marked by place, never by token id (pad = eos in many models).
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from shared.datasets.control_tokens import Encoded, Span
from shared.datasets.templates import Lesson, Prompt, Turn
from shared.datasets.tokens import Tokenizer

# What becomes of a row that is longer than it may be: its end goes, its start goes (the end of the response is learnt
# then), or all of it.
Truncation = Literal["cut_end", "cut_start", "drop_row"]


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """One example as the trainer sees it.

    Attributes:
        ids: token ids, at most `max_length`.
        supervised: for each id, whether predicting it counts in the loss; never true for the first.
        cut: whether tokens of the example are missing.
        last_turn_only: see `Lesson`.
        control_as_text: control tokens in people's texts that were encoded as text.
        control_as_tokens: those in the assistant's that stayed what they say.
    """

    ids: list[int]
    supervised: list[bool]
    cut: bool = False
    last_turn_only: bool = False
    control_as_text: int = 0
    control_as_tokens: int = 0

    @property
    def supervised_count(self) -> int:
        return sum(self.supervised)


def masked_tokens(
    tokenizer: Tokenizer,
    lesson: Lesson,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    truncation: Truncation = "cut_end",
) -> MaskedTokens | None:
    """Encode one example, and fit it into `max_length`.

    A joined lesson is encoded at once, as transformers does; of any other each prompt and each response for itself. In
    both the tokens before a response are those that a request for it starts from.

    Args:
        train_on_prompt: supervise prompts too.

    Returns:
        None if no supervised token is left.

    Raises:
        InvalidRequest: see `Tokenizer.encoded`.
    """
    # One token more than fits tells that something was cut; the start can be cut only where the end is known.
    wanted = None if truncation == "cut_start" else max_length + 1
    ids: list[int] = []
    supervised: list[bool] = []
    for prompt, response, turn in (_joined if lesson.joined else _apart)(tokenizer, lesson.turns, wanted):
        ids += prompt + response
        supervised += [train_on_prompt] * len(prompt) + [turn.supervised] * len(response)
        if wanted is not None and len(ids) >= wanted:
            break
    whole = MaskedTokens(ids, supervised, False, lesson.last_turn_only, *_control_tokens(tokenizer, lesson))
    return fitted(whole, max_length, truncation)


def _control_tokens(tokenizer: Tokenizer, lesson: Lesson) -> tuple[int, int]:
    """(as text, as tokens) in what is not the template's own."""
    control, as_text, as_tokens = tokenizer.control, 0, 0
    for turn in lesson.turns:
        for part in (turn.prompt, turn.response):
            literal = tokenizer.literal(part)
            as_text += sum(part.text[start:end] in control.all for start, end in literal)
            if part is turn.response and part.source != "author":
                meant = control.meant(part.text, literal)
                as_tokens += sum(part.text[start:end] not in control.special for start, end in meant)
    return as_text, as_tokens


def fitted(whole: MaskedTokens, max_length: int, truncation: Truncation) -> MaskedTokens | None:
    """An example in `max_length` tokens; None if no supervised token is left."""
    cut = len(whole.ids) > max_length
    if cut and truncation == "drop_row":
        return None
    part = slice(-max_length, None) if truncation == "cut_start" else slice(max_length)
    ids, supervised = whole.ids[part], whole.supervised[part]
    # No token comes before the first to predict it from.
    supervised[:1] = [False]
    return replace(whole, ids=ids, supervised=supervised, cut=cut) if any(supervised) else None


def _apart(
    tokenizer: Tokenizer, turns: Sequence[Turn], wanted: int | None
) -> Iterator[tuple[list[int], list[int], Turn]]:
    for turn in turns:
        yield tokenizer.encode_prompt(turn.prompt, at_most=wanted), tokenizer.response_ids(turn, at_most=wanted), turn


def _joined(
    tokenizer: Tokenizer, turns: Sequence[Turn], wanted: int | None
) -> Iterator[tuple[list[int], list[int], Turn]]:
    text, literal, borders = "", [], []
    for part in (part for turn in turns for part in (turn.prompt, turn.response)):
        literal += [(start + len(text), end + len(text)) for start, end in tokenizer.literal(part)]
        text += part.text
        borders.append(len(text))
    whole = Prompt(text, turns[0].prompt.add_special_tokens, "template", tuple(literal))
    encoded = _as_served(tokenizer, whole, borders[::2], wanted)
    starts = [start for start, _ in encoded.spans]
    places = [0, *(bisect.bisect_left(starts, border) for border in borders)]
    for turn, start, middle, end in zip(turns, places[::2], places[1::2], places[2::2], strict=False):
        eos = [] if turn.ended else [tokenizer.eos_id]
        yield encoded.ids[start:middle], encoded.ids[middle:end] + eos, turn


def _as_served(tokenizer: Tokenizer, whole: Prompt, prompt_ends: Sequence[int], wanted: int | None) -> Encoded:
    """The text encoded at once, but for the ends of prompts at which that would not be what is served: cut there."""
    encoded = tokenizer.encoded(whole, at_most=wanted)
    starts = [start for start, _ in encoded.spans]
    # A control token stands for itself, whatever surrounds it: what comes before the last one cannot differ.
    settled = [start for start, _ in tokenizer.control.meant(whole.text, whole.literal)]
    cuts = [0]
    for end in prompt_ends:
        if wanted is not None and starts and end > starts[-1] and len(encoded.ids) >= wanted:
            break
        place = bisect.bisect_right(settled, end - 1)
        since = max(settled[place - 1] if place else 0, cuts[-1])
        alone = tokenizer.encoded(_part(whole, since, end)).ids
        first = bisect.bisect_left(starts, since)
        if encoded.ids[first : bisect.bisect_left(starts, end)] != alone or _straddled(encoded, end):
            cuts.append(end)
    if len(cuts) == 1:
        return encoded
    ids: list[int] = []
    spans: list[Span] = []
    for start, end in pairwise([*cuts, len(whole.text)]):
        piece = tokenizer.encoded(_part(whole, start, end), at_most=wanted)
        ids += piece.ids
        spans += [(first + start, last + start) for first, last in piece.spans]
    return Encoded(ids, spans)


def _straddled(encoded: Encoded, border: int) -> bool:
    return any(start < border < end for start, end in encoded.spans)


def _part(whole: Prompt, start: int, end: int) -> Prompt:
    literal = tuple((a - start, b - start) for a, b in whole.literal if start <= a and b <= end)
    return Prompt(whole.text[start:end], whole.add_special_tokens and start == 0, "template", literal)
