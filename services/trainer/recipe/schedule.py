"""The learning rate as a pure function of the step; the shapes are transformers' `get_scheduler`'s.

One difference: the first step of a warm-up has the first rate above 0; at a rate of 0 it would change nothing.
"""

import math

from shared.jobs.spec import Hyperparameters


def learning_rate(step: int, total_steps: int, hyper: Hyperparameters) -> float:
    """The learning rate of 0-based optimizer step `step`: linear warm-up, then constant, or linear or cosine to 0."""
    warmup = math.ceil(total_steps * hyper.warmup_ratio)
    if step < warmup:
        return hyper.learning_rate * (step + 1) / (warmup + 1)
    if hyper.scheduler == "constant":
        return hyper.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    if hyper.scheduler == "linear":
        return hyper.learning_rate * (1 - progress)
    return hyper.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
