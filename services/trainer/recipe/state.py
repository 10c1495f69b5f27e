"""What changes while a job trains: the part that checkpoints keep, and the part that belongs to this claim only."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from services.trainer.model.lora import Parameters
from services.trainer.recipe.eta import Throughput
from services.trainer.recipe.metrics import History
from services.trainer.recipe.rng import RandomState


@dataclass(slots=True)
class ClaimState:
    """What this claim measures and holds; the next claim may run on another machine.

    Attributes:
        token_budget: most tokens of a micro-batch, as the layout has it or, on a GPU, what fits into its memory. No
            promise depends on it there: how samples are packed changes the loss by rounding only.
        largest_micro_batch_tokens: so far, which is what the peak of memory depends on.
        evaluation_seconds: how long the last evaluation took.
        resume_states: committed resume states still on disk, oldest first.
    """

    token_budget: int
    throughput: Throughput
    largest_micro_batch_tokens: int = 0
    evaluation_seconds: float = 0.0
    resume_states: list[Path] = field(default_factory=list)

    def halve_token_budget(self, tokens: int, longest: int) -> bool:
        """Make micro-batches smaller than those of `tokens` tokens that a GPU had no memory for.

        Returns:
            False if there is nothing to divide: a row of `longest` tokens is alone already.
        """
        if tokens <= longest:
            return False
        self.token_budget = max(longest, min(self.token_budget, tokens) // 2)
        return True


@dataclass(slots=True)
class TrainingState:
    """A run between two steps.

    Attributes:
        random: the generators' state right after the last whole step.
        saved_step: the step of the newest committed checkpoint, 0 if there is none.
        claim: the part that no checkpoint keeps.
    """

    parameters: Parameters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    history: History
    random: RandomState
    claim: ClaimState
    saved_step: int = 0
