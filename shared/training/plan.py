"""How long a training run is: its optimizer steps, the checkpoints among them, and the tokens it computes at once.

The estimate asks before there is a job, the trainer while it runs: both get their numbers here. Knows no torch.
"""

from dataclasses import dataclass
from math import ceil, lcm

from shared.jobs.spec import Hyperparameters

# Most tokens of a micro-batch, unless one row alone is longer. How soon a stop is seen depends on it: on a CPU a
# micro-batch takes seconds.
CPU_TOKEN_BUDGET = 1024
CUDA_TOKEN_BUDGET = 16384


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The steps of one run.

    Attributes:
        rows: rows trained on in each epoch, at least 1.
        batch_size: rows of an optimizer step; the last step of an epoch takes what is left.
        max_steps: ends the run before its epochs do.
        checkpoint_steps: a checkpoint every so many steps, besides one per epoch and one at the end.
    """

    rows: int
    batch_size: int
    n_epochs: int
    max_steps: int | None = None
    checkpoint_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.rows / self.batch_size)

    @property
    def total_steps(self) -> int:
        steps = self.n_epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def ends_epoch(self, steps: int) -> bool:
        """Whether an epoch is complete after `steps` steps."""
        return steps % self.steps_per_epoch == 0

    def checkpoint_due(self, steps: int) -> bool:
        """Whether a checkpoint is written after `steps` steps: each epoch, every `checkpoint_steps`, and at the end."""
        at_step = self.checkpoint_steps is not None and steps % self.checkpoint_steps == 0
        return at_step or self.ends_epoch(steps) or steps == self.total_steps

    def checkpoints_after(self, steps: int) -> int:
        """How many checkpoints come after `steps` steps; one that is due for two reasons counts once."""
        every, epoch, total = self.checkpoint_steps, self.steps_per_epoch, self.total_steps

        def multiples(of: int) -> int:
            return total // of - steps // of

        found = multiples(epoch)
        if every is not None:
            found += multiples(every) - multiples(lcm(epoch, every))
        at_the_end = total % epoch == 0 or (every is not None and total % every == 0)
        return found + (steps < total and not at_the_end)


def plan_training(rows: int, hyper: Hyperparameters) -> TrainingPlan:
    """The plan of a job that trains on `rows` rows, dropped and held-out ones not counted."""
    return TrainingPlan(rows, hyper.batch_size, hyper.n_epochs, hyper.max_steps, hyper.checkpoint_steps)


def held_out_rows(rows: int, validation_split: float) -> int:
    """How many of `rows` rows are held out for validation: at least one, unless the split is 0."""
    return max(1, round(validation_split * rows)) if validation_split else 0
