"""Epochs and batch size where nobody said: from the number of rows alone.

docs/training-notes.md has the runs that they come from. Knows no torch.
"""

from math import ceil

# Enough steps for a row or two to be recited.
FEWEST_STEPS = 30
MOST_EPOCHS = 50
# Rows up to which a batch size is taken; more rows take 8.
BATCHES = ((19, 1), (99, 2), (299, 4))
# Rows up to which so many epochs are taken at least; more rows take 1. Three rows are recited after ten, and twenty
# make the model forget more of what it knew.
EPOCHS = ((19, 10), (99, 5), (4_999, 3), (49_999, 2))


def automatic_batch_size(rows: int) -> int:
    """Rows of an optimizer step."""
    return next((size for most, size in BATCHES if rows <= most), 8)


def automatic_epochs(rows: int, batch_size: int) -> int:
    """Times that each row is trained on: so often that there are enough steps, at most 50 times."""
    usual = next((epochs for most, epochs in EPOCHS if rows <= most), 1)
    return min(MOST_EPOCHS, max(usual, ceil(FEWEST_STEPS / ceil(rows / batch_size))))
