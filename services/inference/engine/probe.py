"""Which packed weights are fastest on this processor, among those that keep the model's quality.

Kernels differ by processor (fp16 conversion, AVX-512, VNNI), so this is measured, not looked up: the time of prefill
and decode steps, and the loss on a fixed text, against plain weights. Knows runners and tensors, but no settings.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

import torch

from services.inference.engine.llama import LlamaRunner
from services.inference.engine.packed import PackedPrecision, unusable
from shared.logs import get_logger

GATE = 0.005
"""Largest relative change of the loss that a precision may cause."""

MARGIN = 0.1
"""The share of the time that less exact weights must save to be chosen."""

TEXT = """### Instruction:
What does `json.dumps` do in Python?

### Response:
Serialize an object to a JSON formatted string. If `skipkeys` is true, then keys that are not of a basic type are
skipped instead of raising an error. If `indent` is a non-negative integer, then array elements and object members are
printed on lines of their own with that indent level.

The river had risen in the night, and by morning the lower fields were under water. Nobody in the village could remember
a spring like it: the oldest of them spoke of a flood in his grandfather's time, when boats were tied to the church.

def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
"""
_BATCHES = (1, 8, 16)
_log = get_logger("probe")


@dataclass(frozen=True, slots=True)
class Measured:
    """One precision on this machine.

    Attributes:
        step_ms: of one decode step, by rows.
        prefill_ms: of the tokens of `TEXT`.
        loss: mean negative log likelihood of `TEXT`, nats per token.
        loss_change: relative to plain weights.
    """

    precision: PackedPrecision
    step_ms: dict[int, float]
    prefill_ms: float
    loss: float
    loss_change: float

    @property
    def mean_ms(self) -> float:
        return geometric_mean([*self.step_ms.values(), self.prefill_ms])

    @property
    def passes(self) -> bool:
        return abs(self.loss_change) <= GATE


def measure(model: Any, ids: Sequence[int], precisions: Sequence[PackedPrecision]) -> list[Measured]:
    """Measure plain weights and each of `precisions`, on the tokens of `TEXT`.

    A precision that cannot be measured (its kernel does not run on this processor, its loss is not a number) is left
    out and logged. Without plain weights there is nothing to compare with, and the result is empty.
    """
    results: list[Measured] = []
    candidates: list[PackedPrecision] = ["plain", *(each for each in precisions if each != "plain")]
    for precision in candidates:
        try:
            measured = _measure_one(model, list(ids), precision, results[0].loss if results else None)
        except Exception as error:
            _log.warning("precision left out", precision=precision, error=str(error))
            if precision == "plain":
                break
            continue
        results.append(measured)
        _log.info("precision measured", precision=precision, step_ms=measured.step_ms, loss_change=measured.loss_change)
    return results


def fastest(results: Sequence[Measured]) -> PackedPrecision:
    """The fastest precision that passes the gate, by the geometric mean over prefill and batch sizes.

    Args:
        results: the most exact first; a less exact one must be faster by `MARGIN`.

    Returns:
        `plain` if none passes.
    """
    best: Measured | None = None
    for each in results:
        if each.passes and (best is None or each.mean_ms < best.mean_ms * (1 - MARGIN)):
            best = each
    return best.precision if best else "plain"


def _measure_one(model: Any, ids: list[int], precision: PackedPrecision, plain_loss: float | None) -> Measured:
    reason = unusable(precision)
    if reason is not None:
        raise ValueError(reason)
    context = len(ids) + 32
    runner = LlamaRunner(model, precision=precision, rows=max(_BATCHES), context=context, adapter_slots=1)
    with torch.inference_mode():
        loss = _loss(runner, ids[: runner.context])
        if not math.isfinite(loss):
            raise ValueError(f"its loss is {loss}")
        started = time.perf_counter()
        _loss(runner, ids[: runner.context])
        prefill_ms = round((time.perf_counter() - started) * 1e3, 3)
        step_ms = {rows: _step_ms(runner, rows) for rows in _BATCHES}
    change = 0.0 if plain_loss is None else (loss - plain_loss) / max(plain_loss, 1e-9)
    return Measured(precision, step_ms, prefill_ms, loss, change)


def _loss(runner: LlamaRunner, ids: list[int]) -> float:
    logits = runner.prefill(0, ids, 0, 0, all_logits=True)
    following = torch.tensor(ids[1:], device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits[:-1], following))


def _step_ms(runner: LlamaRunner, rows: int, *, warm: int = 2, timed: int = 7) -> float:
    position, zeros = min(64, runner.context - 1), [0] * rows
    times = []
    for _ in range(warm + timed):
        started = time.perf_counter()
        runner.decode(0, zeros, [position] * rows, zeros)
        times.append((time.perf_counter() - started) * 1e3)
    return round(median(times[warm:]), 3)
