"""A job's peak of memory, before it is begun: on a CPU from the base's shape, on a GPU from finished jobs like it.

What a GPU keeps of a token depends on the pieces that run there, so nothing is said of it before it was measured; and a
peak is not a straight line from zero: buffers that do not grow with the tokens are in it.
"""

import random
import statistics
from collections.abc import Sequence

from services.gateway.jobs.calibration import CALIBRATION_JOBS, Calibration, MeasuredPeak
from shared.jobs.spec import JobSpec
from shared.training.memory import ModelShape, peak_memory_mb
from shared.training.plan import CPU_TOKEN_BUDGET, CUDA_TOKEN_BUDGET

SHUFFLES = 3
# A finished job whose micro-batches had so many times the tokens, or so many times fewer, says nothing of this one.
FARTHEST = 2


def memory_on_cpu_mb(
    spec: JobSpec, lengths: Sequence[int], calibration: Calibration | None, shape: ModelShape | None
) -> float | None:
    """Of the worker's process, MB of 10^6 bytes; None if the shape is not known and no job has measured it.

    Args:
        lengths: tokens of each row, or of a sample of them.
    """
    if shape is None or not lengths:
        return calibration.peak_memory_mb if calibration else None
    tokens = largest_micro_batch_tokens(lengths, spec.hyperparameters.batch_size, CPU_TOKEN_BUDGET)
    beyond = calibration.memory_beyond_model_mb or 0 if calibration else 0
    return round(peak_memory_mb(shape, spec.base_precision, spec.lora, tokens) + beyond, 1)


def memory_on_gpu_mb(spec: JobSpec, lengths: Sequence[int], peaks: Sequence[MeasuredPeak]) -> float | None:
    """Of the GPU's allocator, MB of 10^6 bytes; None if no finished job's micro-batches were near this one's.

    What a job took beside its base is taken to grow with the tokens of the largest micro-batch. A GPU with less memory
    computes smaller ones than are reckoned with here.

    Args:
        lengths: as above.
        peaks: of finished jobs of the same base and precision, newest first.
    """
    if not lengths:
        return None
    tokens = largest_micro_batch_tokens(lengths, spec.hyperparameters.batch_size, CUDA_TOKEN_BUDGET)
    near = [peak for peak in peaks if peak.tokens <= FARTHEST * tokens and tokens <= FARTHEST * peak.tokens]
    found = [peak.base_mb + (peak.peak_mb - peak.base_mb) * tokens / peak.tokens for peak in near[:CALIBRATION_JOBS]]
    return round(statistics.median(found), 1) if found else None


def largest_micro_batch_tokens(lengths: Sequence[int], batch_size: int, token_budget: int) -> int:
    """Tokens of the largest micro-batch that steps of random rows come to; the trainer has an order of its own."""
    order = random.Random(0)  # noqa: S311
    epochs = [order.sample(lengths, len(lengths)) for _ in range(SHUFFLES)]
    steps = (sum(epoch[start : start + batch_size]) for epoch in epochs for start in range(0, len(epoch), batch_size))
    return max(max(lengths), min(token_budget, max(steps)))
