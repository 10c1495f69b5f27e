from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.jobs.spec import Hyperparameters
from shared.training.automatic import FEWEST_STEPS, MOST_EPOCHS, automatic_batch_size, automatic_epochs


@given(st.integers(1, 10**7), st.integers(1, 256))
def test_there_are_enough_steps_or_as_many_epochs_as_there_can_be(rows: int, batch_size: int) -> None:
    epochs = automatic_epochs(rows, batch_size)
    assert epochs == MOST_EPOCHS or epochs * ceil(rows / batch_size) >= FEWEST_STEPS
    Hyperparameters(n_epochs=epochs, batch_size=batch_size)


@given(st.integers(1, 10**7))
def test_more_rows_are_never_trained_on_more_often_nor_in_smaller_steps(rows: int) -> None:
    batch_size = automatic_batch_size(rows)
    assert automatic_batch_size(rows + 1) >= batch_size
    assert automatic_epochs(rows + 1, batch_size) <= automatic_epochs(rows, batch_size)


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs"),
    [
        (1, 1, 30),
        (2, 1, 15),
        (3, 1, 10),
        (10, 1, 10),
        (50, 2, 5),
        (150, 4, 3),
        (300, 8, 3),
        (3_000, 8, 3),
        (10_000, 8, 2),
        (50_000, 8, 1),
    ],
)
def test_the_documented_choices(rows: int, batch_size: int, epochs: int) -> None:
    assert (automatic_batch_size(rows), automatic_epochs(rows, automatic_batch_size(rows))) == (batch_size, epochs)
