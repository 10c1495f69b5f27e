"""When checkpoints are due, and how many are left."""

from hypothesis import given
from hypothesis import strategies as st

from shared.jobs.spec import Hyperparameters
from shared.training.plan import held_out_rows, plan_training


@given(st.integers(1, 30), st.integers(1, 4), st.none() | st.integers(1, 9), st.none() | st.integers(1, 60), st.data())
def test_the_checkpoints_after_a_step_are_those_that_will_be_due(
    rows: int, epochs: int, every: int | None, most: int | None, data: st.DataObject
) -> None:
    hyper = Hyperparameters(n_epochs=epochs, batch_size=3, checkpoint_steps=every, max_steps=most)
    plan = plan_training(rows, hyper)
    step = data.draw(st.integers(0, plan.total_steps))
    due = [later for later in range(step + 1, plan.total_steps + 1) if plan.checkpoint_due(later)]
    assert plan.checkpoints_after(step) == len(due)
    assert not due or due[-1] == plan.total_steps


def test_a_split_holds_out_at_least_one_row() -> None:
    assert [held_out_rows(rows, 0.1) for rows in (1, 4, 14, 16, 100)] == [1, 1, 1, 2, 10]
    assert held_out_rows(100, 0) == 0
