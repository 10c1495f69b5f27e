"""Out of memory during training: one error for all its forms, with what to change. `memory` foresees it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from services.trainer.recipe.memory import Shortage
from shared.errors import JobFailed


@contextmanager
def out_of_memory_explained(shortage: Shortage | None = None) -> Iterator[None]:
    """Turn every form of out-of-memory error into one.

    Args:
        shortage: as foreseen before the first step, if it was.

    Raises:
        JobFailed: `out_of_memory`, with what to change, in numbers if they are known.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        fields = list(shortage.smaller) if shortage else []
        raise JobFailed(
            f"out of memory; {shortage.advice}"
            if shortage
            else "out of memory; lower max_length, use base_precision int8 or nf4, or fewer target modules",
            param=f"hyperparameters.{fields[0]}" if fields else None,
            code="out_of_memory",
        ) from error
