"""The loss mask: the token ids of a training example, and which of them are supervised.

Supervised are the response and its EOS; they are marked by length, never by token id (pad = eos in many models).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.datasets.templates import Turn
from shared.datasets.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """One example as the trainer sees it.

    Attributes:
        ids: token ids, at most `max_length`.
        supervised: for each id, whether predicting it counts in the loss; never true for the first.
    """

    ids: list[int]
    supervised: list[bool]

    @property
    def supervised_count(self) -> int:
        return sum(self.supervised)


def masked_tokens(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, max_length: int, train_on_prompt: bool = False
) -> MaskedTokens | None:
    """Encode one example: for each turn encode(prompt) + encode(response) + EOS, cut at `max_length`.

    Args:
        train_on_prompt: supervise prompts too.

    Returns:
        None if no supervised token is left (all were cut off).
    """
    ids: list[int] = []
    supervised: list[bool] = []
    for turn in turns:
        left = max_length - len(ids)
        prompt = tokenizer.encode_prompt(turn.prompt, at_most=left)
        response = [*tokenizer.encode(turn.response, add_special_tokens=False, at_most=left), tokenizer.eos_id]
        ids += prompt + response
        supervised += [train_on_prompt] * len(prompt) + [turn.supervised] * len(response)
        if len(ids) >= max_length:
            break
    ids, supervised = ids[:max_length], supervised[:max_length]
    # No token comes before the first to predict it from.
    supervised[:1] = [False]
    return MaskedTokens(ids, supervised) if any(supervised) else None
