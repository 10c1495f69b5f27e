from collections import Counter
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.data.layout import Layout, plan_layout
from shared.jobs.spec import Hyperparameters
from shared.training.plan import CPU_TOKEN_BUDGET, TrainingPlan

lengths = st.lists(st.integers(2, 700), min_size=1, max_size=60)


def make(
    lengths: list[int], batch_size: int = 8, n_epochs: int = 3, seed: int = 42, max_steps: int | None = None
) -> Layout:
    plan = TrainingPlan(len(lengths), batch_size, n_epochs, max_steps)
    return Layout(np.asarray(lengths, np.int64), plan, seed, 1024)


@given(lengths, st.integers(1, 20), st.integers(1, 4), st.integers(0, 9))
def test_every_epoch_sees_every_row_once_and_every_step_its_batch(
    lengths: list[int], batch: int, epochs: int, seed: int
) -> None:
    layout = make(lengths, batch, epochs, seed)
    steps = [layout.rows(step) for step in range(layout.total_steps)]
    for epoch in range(epochs):
        of_epoch = steps[epoch * layout.steps_per_epoch : (epoch + 1) * layout.steps_per_epoch]
        assert sorted(chain(*of_epoch)) == list(range(len(lengths)))
        assert all(len(rows) == batch for rows in of_epoch[:-1])
        assert 1 <= len(of_epoch[-1]) <= batch


@given(lengths, st.integers(1, 20))
def test_micro_batches_hold_the_steps_rows_within_the_budget(lengths: list[int], batch: int) -> None:
    layout = make(lengths, batch)
    for step in range(layout.steps_per_epoch):
        batches = layout.micro_batches(step)
        assert Counter(chain(*batches)) == Counter(layout.rows(step))
        assert all(sum(lengths[row] for row in rows) <= 1024 or len(rows) == 1 for rows in batches)


@given(lengths, st.integers(1, 20), st.one_of(st.none(), st.integers(1, 30)))
def test_tokens_before_counts_what_the_steps_hold(lengths: list[int], batch: int, max_steps: int | None) -> None:
    layout = make(lengths, batch, max_steps=max_steps)
    tokens = 0
    for step in range(layout.total_steps):
        assert layout.tokens_before(step) == tokens
        tokens += sum(lengths[row] for row in layout.rows(step))
    assert layout.tokens_before(layout.total_steps) == tokens


def test_order_is_a_pure_function_of_the_job_and_differs_between_epochs_and_seeds() -> None:
    layout, again, other = make([5] * 64), make([5] * 64), make([5] * 64, seed=43)
    # Asked in another order: nothing is remembered that matters.
    backwards = {step: again.rows(step) for step in reversed(range(again.total_steps))}
    assert all(layout.rows(step) == backwards[step] for step in range(layout.total_steps))
    assert layout.rows(0) != layout.rows(layout.steps_per_epoch)
    assert layout.rows(0) != other.rows(0)


def test_identity_names_everything_that_shapes_the_order() -> None:
    identities = {
        make([5, 6, 7, 8]).identity,
        make([5, 6, 7, 9]).identity,
        make([5, 6, 7, 8], seed=1).identity,
        make([5, 6, 7, 8], batch_size=2).identity,
        make([5, 6, 7, 8], n_epochs=2).identity,
        make([5, 6, 7, 8], max_steps=1).identity,
    }
    assert len(identities) == 6
    assert make([5, 6, 7, 8]).identity in identities


def test_max_steps_ends_early_and_the_cpu_budget_bounds_the_wait_for_a_stop() -> None:
    layout = plan_layout(np.full(20, 9), Hyperparameters(max_steps=2), 42, "cpu")
    assert (layout.total_steps, layout.steps_per_epoch, layout.epoch(2)) == (2, 3, round(2 / 3, 4))
    assert layout.token_budget == CPU_TOKEN_BUDGET == 1024
