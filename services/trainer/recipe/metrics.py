"""Counters of a training run, and how much of the machine it used.

MFU counts 4N FLOP per token, N being the weights of all linear layers and the output head: 2N forward and 2N for the
gradient of the activations; the frozen base needs no weight gradients, and no activation is computed twice.
"""

import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from services.trainer.model.frozen import multiply
from services.trainer.recipe.step import StepResult


@dataclass(slots=True)
class History:
    """Everything reported about a run that cannot be computed again; every checkpoint has it.

    Attributes:
        step: whole optimizer steps done.
        trained_tokens, total_tokens: supervised and real (non-pad) tokens seen.
        seconds: time spent in optimizer steps, over all claims.
        window: (loss, tokens, seconds) of each step since the last metrics event.
        loss_sum: of all steps' losses.
        grad_norm: of the last step that was not skipped.
        valid_losses: (step, loss), step 0 being the untrained adapter.
    """

    step: int = 0
    trained_tokens: int = 0
    total_tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    window: list[tuple[float, int, float]] = field(default_factory=list)
    grad_norm: float = 0.0
    skipped_in_a_row: int = 0
    valid_losses: list[tuple[int, float]] = field(default_factory=list)

    def add(self, result: StepResult, seconds: float) -> None:
        self.step += 1
        self.trained_tokens += result.supervised_tokens
        self.total_tokens += result.tokens
        self.seconds += seconds
        self.loss_sum += result.loss
        self.window.append((result.loss, result.tokens, seconds))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            self.grad_norm = result.grad_norm

    @property
    def tokens_per_second(self) -> float:
        return self.total_tokens / self.seconds if self.seconds else 0.0

    @property
    def window_loss(self) -> float:
        """Mean loss of the steps since the last metrics event."""
        return sum(loss for loss, _, _ in self.window) / len(self.window) if self.window else self.mean_loss

    @property
    def window_rate(self) -> float:
        """Real tokens per second of the steps since the last metrics event."""
        seconds = sum(seconds for _, _, seconds in self.window)
        return sum(tokens for _, tokens, _ in self.window) / seconds if seconds else self.tokens_per_second

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / self.step if self.step else 0.0

    def valid_loss(self, step: int) -> float | None:
        return next((loss for at, loss in self.valid_losses if at == step), None)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest validation loss since training began, the earliest of equals."""
        return min((found for found in self.valid_losses if found[0]), key=lambda found: found[1], default=None)

    @property
    def evaluations_since_best(self) -> int:
        return sum(step > self.best[0] for step, _ in self.valid_losses) if self.best else 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "History":
        lists = {key: [tuple(item) for item in values[key]] for key in ("window", "valid_losses")}
        return cls(**(values | lists))


def matmul_parameters(model: nn.Module) -> int:
    """Weights that take part in matrix products: linear layers and the output head, a tied one included."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))


def utilisation(tokens_per_second: float, matmul_weights: int, peak_flops: float | None) -> float | None:
    """MFU by the module's formula; None without a measured peak."""
    return 4 * matmul_weights * tokens_per_second / peak_flops if peak_flops else None


def measure_peak_flops(device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """FLOP/s that a perfect step could reach on an idle machine, by square matrix products of `size`."""
    return _peak_of_gpu(device, dtype, size or 8192) if device.type == "cuda" else _peak_of_cpu(dtype, size or 1536)


def _peak_of_cpu(dtype: torch.dtype, size: int) -> float:
    """By the best of twenty products."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        multiply(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _peak_of_gpu(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """By the best of three rows of ten products, each row timed by the device itself.

    One product is over before the host has seen its end, and constants are multiplied faster than data.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    best = float("inf")
    for _ in range(4):
        start.record()
        for _ in range(10):
            torch.mm(a, b, out=out)
        end.record()
        torch.cuda.synchronize(device)
        # The first row loads the kernel.
        best = min(best, start.elapsed_time(end) / 1e3)
    del a, b, out
    torch.cuda.empty_cache()
    return 10 * 2 * size**3 / best


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak afresh, where the system lets us: a warm worker has had jobs before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # proc(5): 5 resets the resident set's high-water mark.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mb(device: torch.device) -> float:
    """Peak resident memory of the process (CPU) or of the allocator (CUDA), MB of 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
