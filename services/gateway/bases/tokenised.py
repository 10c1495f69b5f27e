"""A file's rows as the trainer will see them, with `tokenizers` alone, and what they come to. Knows no HTTP, no SQL."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path

from shared.datasets.checker import read_examples
from shared.datasets.examples import format_of
from shared.datasets.loss_mask import MaskedTokens
from shared.datasets.templates import template_for
from shared.datasets.tokens import Tokenizer
from shared.datasets.training_rows import training_rows
from shared.errors import InvalidRequest
from shared.jobs.spec import Hyperparameters
from shared.storage.artifacts import LocalArtifactStore

# Of a larger file so many rows are tokenised, and the rest is taken to be like them.
SAMPLED_ROWS = 2_000


@dataclass(frozen=True, slots=True)
class TokenisedRow:
    """One row; `tokens` is None if nothing of its response is left within `max_length`."""

    number: int
    template: str
    tokens: MaskedTokens | None


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What a file comes to.

    Attributes:
        rows: rows with supervised tokens, as they are trained on.
        dropped: rows of the file that have none within `max_length`.
        truncated: rows of which a part is cut.
        tokens, supervised_tokens: of all rows that are not dropped, once.
        lengths: tokens of each row that was tokenised.
    """

    rows: int
    dropped: int
    tokens: int
    supervised_tokens: int
    lengths: tuple[int, ...] = ()
    truncated: int = 0

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        """Of both files together."""
        return TokenCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Tokenizers:
    """Tokenizers of the prepared bases, read once each."""

    def __init__(self, artifacts: LocalArtifactStore) -> None:
        self._artifacts = artifacts
        self._known: dict[str, Tokenizer] = {}
        self._lock = threading.Lock()

    def get(self, base_id: str) -> Tokenizer:
        """The tokenizer of a base.

        Raises:
            InvalidRequest: `base_not_prepared`: no worker has had this base yet.
        """
        with self._lock:
            if base_id not in self._known:
                folder = self._artifacts.base(base_id)
                if not (folder / "tokenizer.json").is_file():
                    raise InvalidRequest(
                        f"{base_id} has not been prepared on this installation; its first job does that",
                        param="model",
                        code="base_not_prepared",
                    )
                self._known[base_id] = Tokenizer(folder)
            return self._known[base_id]


def tokenised_rows(
    file: Path, tokenizer: Tokenizer, hyper: Hyperparameters, check: Callable[[], None]
) -> Iterator[TokenisedRow]:
    """Rows of a checked file in order, numbered from 1; a text that fills several has its number several times.

    Args:
        check: asked before each row; what it raises ends the work.

    Raises:
        InvalidRequest: `no_chat_template`: chat rows, and the base has no template for them.
    """
    template = None
    for number, example in enumerate(read_examples(file), 1):
        check()
        template = template or template_for(format_of(example), tokenizer.chat, file.stat().st_mtime)
        rows = training_rows(
            tokenizer,
            template,
            example,
            max_length=hyper.max_length,
            train_on_prompt=hyper.train_on_prompt,
            truncation=hyper.truncation,
        )
        if not rows:
            yield TokenisedRow(number, template.id, None)
        for tokens in rows:
            yield TokenisedRow(number, template.id, tokens)


def count_tokens(rows: Iterator[TokenisedRow], file_rows: int, most: int = SAMPLED_ROWS) -> TokenCounts:
    """The counts of a file of `file_rows` rows, from the first `most` of them."""
    sampled = dropped = truncated = supervised = 0
    lengths = []
    for row in takewhile(lambda row: row.number <= most, rows):
        sampled = row.number
        if row.tokens is None:
            dropped += 1
        else:
            lengths.append(len(row.tokens.ids))
            truncated += row.tokens.cut
            supervised += row.tokens.supervised_count
    scale = file_rows / max(1, sampled)
    return TokenCounts(
        rows=round((len(lengths) + dropped) * scale) - round(dropped * scale),
        dropped=round(dropped * scale),
        tokens=round(sum(lengths) * scale),
        supervised_tokens=round(supervised * scale),
        lengths=tuple(lengths),
        truncated=round(truncated * scale),
    )
