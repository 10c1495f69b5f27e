"""A file's rows as the trainer will see them, with `tokenizers` alone. Knows no HTTP and no SQL."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.datasets.examples import format_of, read_examples
from shared.datasets.templates import template_for
from shared.datasets.tokens import Tokenizer, Tokens
from shared.errors import InvalidRequest
from shared.jobs.spec import Hyperparameters
from shared.storage.artifacts import ArtifactStore


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `tokens` is None if nothing of its response is left within `max_length`."""

    number: int
    template: str
    tokens: Tokens | None


class Tokenizers:
    """Tokenizers of the prepared bases, read once each."""

    def __init__(self, artifacts: ArtifactStore) -> None:
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


def tokenised_rows(file: Path, tokenizer: Tokenizer, hyper: Hyperparameters) -> Iterator[Row]:
    """Rows of a checked file in order, numbered from 1.

    Raises:
        InvalidRequest: `no_chat_template`: chat rows, and the base has no template for them.
    """
    template = None
    for number, example in enumerate(read_examples(file), 1):
        template = template or template_for(format_of(example), tokenizer.chat)
        tokens = tokenizer.encode_turns(
            template.turns(example), max_length=hyper.max_length, train_on_prompt=hyper.train_on_prompt
        )
        yield Row(number, template.id, tokens)
