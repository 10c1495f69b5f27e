"""Which rows each optimizer step trains on, and how they are packed into micro-batches: a pure function of the job.

Nothing here depends on time, machine load or earlier steps, so that a resumed job continues exactly where it was. A
step has exactly `batch_size` rows (the last of an epoch what is left); micro-batches only say how they are computed.
"""

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.jobs.spec import Hyperparameters
from shared.training.plan import CPU_TOKEN_BUDGET, CUDA_TOKEN_BUDGET, TrainingPlan, plan_training

MicroBatch = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The whole run's order.

    Attributes:
        lengths: int64 [rows], tokens of each row.
        plan: how many steps, and the checkpoints among them.
        token_budget: most tokens of a micro-batch, but for single rows that are longer.
    """

    lengths: NDArray[np.int64]
    plan: TrainingPlan
    seed: int
    token_budget: int
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps

    def rows(self, step: int) -> list[int]:
        """Rows of 0-based optimizer step `step`, in the epoch's order."""
        epoch, index = divmod(step, self.steps_per_epoch)
        size = self.plan.batch_size
        rows = self._order(epoch)[index * size : (index + 1) * size]
        return [int(row) for row in rows]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The same rows, longest first, packed by first fit into micro-batches of at most `token_budget` tokens."""
        return pack_rows(self.rows(step), self.lengths, self.token_budget)

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before 0-based `step`."""
        epoch, index = divmod(step, self.steps_per_epoch)
        whole = epoch * int(self.lengths.sum())
        return whole + (int(self.lengths[self._order(epoch)[: index * self.plan.batch_size]].sum()) if index else 0)

    def epoch(self, steps: int) -> float:
        """Epochs done after `steps` steps, with their fraction."""
        return round(steps / self.steps_per_epoch, 4)

    @property
    def identity(self) -> str:
        """Hash of all that decides the order, and of what numpy really makes of the seed in this version."""
        settings = [self.plan.batch_size, self.plan.n_epochs, self.plan.max_steps, self.seed, self.token_budget]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(np.ascontiguousarray(self.lengths).tobytes())
        digest.update(self._order(0).tobytes())
        digest.update(json.dumps(self.micro_batches(0)).encode())
        return digest.hexdigest()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        # One epoch's order at a time: a million rows over fifty epochs would be 400 MB.
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        return self._orders[epoch]


def plan_layout(lengths: NDArray[np.int64], hyper: Hyperparameters, seed: int, device_type: str) -> Layout:
    """The layout of a job on a kind of device."""
    budget = CPU_TOKEN_BUDGET if device_type == "cpu" else CUDA_TOKEN_BUDGET
    return Layout(lengths, plan_training(len(lengths), hyper), seed, budget)


def largest_micro_batch_tokens(lengths: NDArray[np.int64], batch_size: int, token_budget: int) -> int:
    """An upper bound on the tokens of a micro-batch, whatever the order of the rows. Linear in the number of rows."""
    batch = min(batch_size, len(lengths))
    longest = np.partition(lengths, len(lengths) - batch)[len(lengths) - batch :]
    return max(int(longest.max()), min(token_budget, int(longest.sum())))


def pack_rows(rows: list[int], lengths: NDArray[np.int64], token_budget: int) -> list[MicroBatch]:
    """First-fit decreasing (Johnson 1973) of rows into micro-batches of at most `token_budget` tokens.

    Rows of equal length keep their order; a row longer than the budget is alone.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: -int(lengths[r])):
        length = int(lengths[row])
        index = next((i for i, left in enumerate(room) if left >= length), None)
        if index is None:
            bins.append([row])
            room.append(token_budget - length)
        else:
            bins[index].append(row)
            room[index] -= length
    return [tuple(rows) for rows in bins]
