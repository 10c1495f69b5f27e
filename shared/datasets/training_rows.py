"""The rows of tokens that an example is trained as: one, none if nothing of it is learnt, several of a long text."""

import sys

from shared.datasets.examples import Example, Text
from shared.datasets.loss_mask import MaskedTokens, Truncation, masked_tokens
from shared.datasets.templates import Template
from shared.datasets.tokens import Tokenizer


def training_rows(
    tokenizer: Tokenizer,
    template: Template,
    example: Example,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    truncation: Truncation = "cut_end",
) -> list[MaskedTokens]:
    """Encode one example.

    Raises:
        InvalidRequest: it does not fit the template.
    """
    lesson = template.lesson(example)
    if isinstance(example, Text):
        whole = masked_tokens(tokenizer, lesson, max_length=sys.maxsize)
        return _chunks(whole, max_length) if whole else []
    tokens = masked_tokens(
        tokenizer, lesson, max_length=max_length, train_on_prompt=train_on_prompt, truncation=truncation
    )
    return [tokens] if tokens else []


def _chunks(whole: MaskedTokens, max_length: int) -> list[MaskedTokens]:
    """Each begins with the last token of the one before, so that every token but the first is learnt exactly once."""
    chunks = []
    for start in range(0, max(1, len(whole.ids) - 1), max_length - 1):
        ids, supervised = whole.ids[start : start + max_length], whole.supervised[start : start + max_length]
        chunks.append(MaskedTokens(ids, [False, *supervised[1:]]))
    return chunks
