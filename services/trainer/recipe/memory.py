"""Whether a job fits into memory: its largest micro-batch against what is free, and which numbers would fit.

Pure functions of row lengths and bytes. Knows no session, no job store and no model.
"""

from bisect import bisect_right
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from services.trainer.data.layout import largest_micro_batch_tokens
from shared.jobs.spec import Hyperparameters

# Advice is rounded down to lengths that people can remember.
ROUND_LENGTH = 64
MIN_LENGTH = 8


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that training needs beside the loaded base.

    Attributes:
        fixed: independent of the micro-batches.
        per_token: for every token of the largest micro-batch.
    """

    fixed: float
    per_token: float

    def of(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    def tokens_within(self, free: float) -> int:
        """The most tokens of a micro-batch that fit into `free` bytes; 0 if none do."""
        tokens = max(0, int((free - self.fixed) / self.per_token))
        # The division rounds.
        return tokens if tokens == 0 or self.of(tokens) <= free else tokens - 1


@dataclass(frozen=True, slots=True)
class Fit:
    """Hyperparameters that would fit: the job's own, or smaller ones where needed."""

    max_length: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Shortage:
    """A job that needs more memory than there is.

    Attributes:
        tokens: of its largest micro-batch.
        needed, free: bytes beside the loaded base.
        fit: None if not even the shortest rows would fit.
    """

    tokens: int
    needed: float
    free: int
    now: Fit
    fit: Fit | None

    @property
    def smaller(self) -> dict[str, int]:
        """The hyperparameters that have to be smaller, and what would fit."""
        if self.fit is None:
            return {}
        now = asdict(self.now)
        return {name: fit for name, fit in asdict(self.fit).items() if fit < now[name]}

    @property
    def advice(self) -> str:
        """What would fit, as the end of a sentence."""
        if self.fit is None:
            return "no max_length would fit; a base_precision of fewer bits or a smaller base might"
        now = asdict(self.now)
        smaller = (f"{name} {fit:,} (now {now[name]:,})" for name, fit in self.smaller.items())
        return " with ".join(smaller) + " would fit"


def shortage(
    need: Need, free: int, lengths: NDArray[np.int64], hyper: Hyperparameters, token_budget: int
) -> Shortage | None:
    """The shortage of a job on rows of `lengths` tokens, int64 [rows]; None if it fits into `free` bytes."""
    now = Fit(hyper.max_length, hyper.batch_size)
    tokens = largest_micro_batch_tokens(lengths, now.batch_size, token_budget)
    if need.of(tokens) <= free:
        return None
    fit = largest_fit(need.tokens_within(free), lengths, now, token_budget)
    return Shortage(tokens, need.of(tokens), free, now, fit)


def largest_fit(within: int, lengths: NDArray[np.int64], now: Fit, token_budget: int) -> Fit | None:
    """The longest rows whose micro-batches have at most `within` tokens, and the largest batch of such rows."""
    if within < MIN_LENGTH:
        return None
    length = now.max_length
    if lengths.max() > within:
        # Rows have to be cut only then; otherwise fewer of them at a time are enough.
        length = within if within < 2 * ROUND_LENGTH else within // ROUND_LENGTH * ROUND_LENGTH
    cut = np.minimum(lengths, length)
    batches = range(1, now.batch_size + 1)
    fitting = bisect_right(batches, within, key=lambda batch: largest_micro_batch_tokens(cut, batch, token_budget))
    return Fit(length, max(1, fitting))


def fitting_budget(need: Need, free: int, lengths: NDArray[np.int64], token_budget: int) -> int:
    """Most tokens of a micro-batch that fits into `free` bytes, up to `token_budget`; a whole row at least."""
    return max(int(lengths.max()), min(token_budget, need.tokens_within(free)))
