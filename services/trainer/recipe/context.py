"""What one run of the recipe works with and never changes: its job, base, data, precision and connections."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.trainer.contract import Check, JobRun, Session
from services.trainer.data.dataset import Data
from services.trainer.data.layout import Layout
from services.trainer.model.bases import TrainableBase, UntrainedLosses
from services.trainer.model.forward import Packed, pack
from services.trainer.model.precision import Precision
from services.trainer.recipe.batches import Batches
from services.trainer.recipe.checkpoint import Identity
from services.trainer.recipe.free_memory import FreeMemory
from services.trainer.recipe.metrics import History
from shared.storage.artifacts import LocalArtifactStore

Clock = Callable[[], float]
# Logits of a whole row of a large vocabulary would be the run's peak of memory.
SAMPLE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class RunContext:
    """What stays the same from the first step to the last; what changes is `services.trainer.recipe.state`.

    Attributes:
        base_loaded: False if the base was still warm from the job before.
        matmul_weights: weights of the base that take part in matrix products.
        peak_flops: FLOP/s of this machine's matrix products in the job's dtype at best, if measured.
        free_memory: bytes that can still be allocated on a device.
        untrained_losses: those that earlier jobs on this warm base have computed.
        strict_resume: whether a checkpoint of a machine that computes otherwise is refused.
    """

    job: JobRun
    base: TrainableBase
    data: Data
    layout: Layout
    batches: Batches
    precision: Precision
    store: LocalArtifactStore
    session: Session
    check: Check
    clock: Clock
    base_loaded: bool
    matmul_weights: int
    peak_flops: float | None
    free_memory: FreeMemory
    untrained_losses: UntrainedLosses
    strict_resume: bool

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def identity(self) -> Identity:
        """What a checkpoint must agree with to be continued."""
        spec = self.job.spec
        hyperparameters = spec.hyperparameters.model_dump(mode="json")
        if spec.hyperparameters.truncation == "cut_end":
            # The versions before did nothing else, and have not written it down.
            del hyperparameters["truncation"]
        return {
            "training data": self.data.training.key,
            "layout": self.layout.identity,
            "seed": spec.seed,
            "hyperparameters": hyperparameters,
            "lora": spec.lora.model_dump(mode="json"),
            "initial adapter": spec.initial_adapter,
            "base weights": self.base.loaded.sha256,
            "base precision": spec.base_precision,
            "compute dtype": str(self.precision.dtype),
            "device": self.device.type,
            "processor": processor_of(self.device),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
        }

    def sample(self) -> Packed:
        """A few supervised tokens of the first step's shortest row, to tell whether two adapters compute the same."""
        rows = self.data.training
        ids, supervised = rows[min(self.layout.rows(0), key=lambda row: int(rows.lengths[row]))]
        return pack([(ids, supervised & (supervised.cumsum() <= SAMPLE_TOKENS))], self.device)

    def stops_early(self, history: History) -> bool:
        """Whether the validation loss has not fallen for as many checkpoints as the job has patience for."""
        patience = self.job.spec.hyperparameters.early_stopping_patience
        return patience is not None and history.evaluations_since_best >= patience

    def checkpoint_due(self, steps: int) -> bool:
        """Whether a checkpoint is written after `steps` steps."""
        return self.layout.plan.checkpoint_due(steps)


def processor_of(device: torch.device) -> str:
    """What decides in which order a device sums: the instruction set of a CPU, the model of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
