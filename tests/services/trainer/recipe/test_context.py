"""When checkpoints are due, and how many are left."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.contract import JobRun
from services.trainer.data.layout import plan_layout
from services.trainer.recipe.context import RunContext
from shared.jobs.spec import Hyperparameters, JobSpec


@given(st.integers(1, 30), st.integers(1, 4), st.none() | st.integers(1, 9), st.none() | st.integers(1, 60), st.data())
def test_the_checkpoints_left_are_those_that_will_be_due(
    rows: int, epochs: int, every: int | None, most: int | None, data: st.DataObject
) -> None:
    hyper = Hyperparameters(n_epochs=epochs, batch_size=3, checkpoint_steps=every, max_steps=most)
    spec = JobSpec(base="b", base_revision="r", training_file="f", training_sha256="s", hyperparameters=hyper)
    run = object.__new__(RunContext)
    run.job, run.layout = JobRun("ftjob-1", 1, spec), plan_layout(np.full(rows, 5), hyper, 42, "cpu")
    total = run.layout.total_steps
    step = data.draw(st.integers(0, total))
    assert run.checkpoints_left(step) == sum(run.checkpoint_due(later) for later in range(step + 1, total + 1))
