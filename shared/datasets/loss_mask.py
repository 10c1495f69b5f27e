"""The loss mask: the token ids of a training example, and which of them are supervised.

Supervised are the response and its EOS; they are marked by length, never by token id (pad = eos in many models).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.datasets.templates import Turn
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
    """

    ids: list[int]
    supervised: list[bool]
    cut: bool = False

    @property
    def supervised_count(self) -> int:
        return sum(self.supervised)


def masked_tokens(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    *,
    max_length: int,
    train_on_prompt: bool = False,
    truncation: Truncation = "cut_end",
) -> MaskedTokens | None:
    """Encode one example: for each turn encode(prompt) + encode(response) + EOS, and fit it into `max_length`.

    Args:
        train_on_prompt: supervise prompts too.

    Returns:
        None if no supervised token is left.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    for turn in turns:
        # One token more than fits tells that something was cut; the start can be cut only where the end is known.
        left = None if truncation == "cut_start" else max_length + 1 - len(ids)
        prompt = tokenizer.encode_prompt(turn.prompt, at_most=left)
        response = [*tokenizer.encode(turn.response, add_special_tokens=False, at_most=left), tokenizer.eos_id]
        ids += prompt + response
        supervised += [train_on_prompt] * len(prompt) + [turn.supervised] * len(response)
        if left is not None and len(ids) > max_length:
            break
    return fitted(MaskedTokens(ids, supervised), max_length, truncation)


def fitted(whole: MaskedTokens, max_length: int, truncation: Truncation) -> MaskedTokens | None:
    """An example in `max_length` tokens; None if no supervised token is left."""
    cut = len(whole.ids) > max_length
    if cut and truncation == "drop_row":
        return None
    part = slice(-max_length, None) if truncation == "cut_start" else slice(max_length)
    ids, supervised = whole.ids[part], whole.supervised[part]
    # No token comes before the first to predict it from.
    supervised[:1] = [False]
    return MaskedTokens(ids, supervised, cut) if any(supervised) else None
