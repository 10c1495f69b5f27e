"""What one run of the recipe works with, from the first step to the last."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from services.trainer.contract import Check, JobRun, Session
from services.trainer.data.dataset import Data
from services.trainer.data.layout import Layout, pack_rows
from services.trainer.model.bases import TrainableBase
from services.trainer.model.forward import Packed, pack
from services.trainer.model.precision import Precision
from services.trainer.recipe.checkpoint import Identity
from services.trainer.recipe.eta import Throughput
from services.trainer.recipe.memory import FreeMemory, Shortage
from services.trainer.recipe.metrics import History
from shared.storage.artifacts import LocalArtifactStore

Clock = Callable[[], float]
# Logits of a whole row of a large vocabulary would be the run's peak of memory.
SAMPLE_TARGETS = 32


@dataclass(slots=True)
class RunContext:
    """What stays the same from the first step to the last.

    Attributes:
        peak_flops: what this machine's matrix products of the job's dtype reach at best, FLOP/s, if measured.
        evaluation_seconds: how long the last evaluation took.
        free_memory: bytes that can still be had on a device.
        shortage: of memory, as foreseen before the first step.
        token_budget: most tokens of a micro-batch, as the layout has it or, on a GPU, what fits into its memory. No
            promise depends on it there: how samples are packed changes the loss by rounding only.
        tokens_at_once: of the largest micro-batch so far, which is what the peak of memory depends on.
        resume_states: committed resume states still on disk, oldest first.
    """

    job: JobRun
    base: TrainableBase
    data: Data
    layout: Layout
    precision: Precision
    store: LocalArtifactStore
    session: Session
    check: Check
    clock: Clock
    base_loaded: bool
    matmul_weights: int
    peak_flops: float | None
    free_memory: FreeMemory
    token_budget: int
    shortage: Shortage | None = None
    evaluation_seconds: float = 0.0
    tokens_at_once: int = 0
    throughput: Throughput = field(default_factory=Throughput)
    resume_states: list[Path] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def identity(self) -> Identity:
        """What a checkpoint must agree with to be continued."""
        spec = self.job.spec
        return {
            "training data": self.data.training.key,
            "layout": self.layout.identity,
            "seed": spec.seed,
            "hyperparameters": spec.hyperparameters.model_dump(mode="json"),
            "lora": spec.lora.model_dump(mode="json"),
            "initial adapter": spec.initial_adapter,
            "base weights": self.base.loaded.sha256,
            "base precision": spec.base_precision,
            "compute dtype": str(self.precision.dtype),
            "device": self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
        }

    def packs(self, step: int) -> list[Packed]:
        """The micro-batches of 0-based step `step`, as tensors."""
        rows = self.data.training
        batches = pack_rows(self.layout.rows(step), self.layout.lengths, self.token_budget)
        return [pack([rows[row] for row in batch], self.device) for batch in batches]

    def halve_budget(self, most: int, longest: int) -> bool:
        """Make micro-batches smaller than those of `most` tokens that a GPU had no memory for.

        Returns:
            False if there is nothing to divide: a row of `longest` tokens is alone already.
        """
        if most <= longest:
            return False
        self.token_budget = max(longest, min(self.token_budget, most) // 2)
        return True

    def sample(self) -> Packed:
        """A few targets of the first step's shortest row: enough to tell whether two adapters compute the same."""
        rows = self.data.training
        ids, supervised = rows[min(self.layout.rows(0), key=lambda row: int(rows.lengths[row]))]
        return pack([(ids, supervised & (supervised.cumsum() <= SAMPLE_TARGETS))], self.device)

    def gives_up(self, history: History) -> bool:
        """Whether the validation loss has not fallen for as many checkpoints as the job has patience for."""
        patience = self.job.spec.hyperparameters.early_stopping_patience
        return patience is not None and history.evaluations_since_best >= patience

    def checkpoint_due(self, steps: int) -> bool:
        """Whether a checkpoint is written after `steps` steps."""
        return self.layout.plan.checkpoint_due(steps)
