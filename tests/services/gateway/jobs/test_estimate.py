"""The estimate's arithmetic, held against the trainer's own plan and layout."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.bases.tokenised import TokenCounts, TokenisedRow, count_tokens
from services.gateway.jobs.calibration import Calibration, MeasuredPeak
from services.gateway.jobs.estimate import estimate
from services.gateway.jobs.peak_memory import largest_micro_batch_tokens, memory_on_gpu_mb
from services.trainer.data.layout import plan_layout
from shared.datasets.loss_mask import MaskedTokens
from shared.errors import InvalidRequest
from shared.jobs.spec import DeviceKind, Hyperparameters, JobSpec
from shared.training.memory import ModelShape
from shared.training.plan import CPU_TOKEN_BUDGET, CUDA_TOKEN_BUDGET

SPEC = JobSpec(base="tiny", base_revision="r", training_file="f", training_sha256="s")
SHAPE = ModelShape(2, 32, 64, 32, 16, 400, tied=True)
BUDGETS: dict[DeviceKind, int] = {"cpu": CPU_TOKEN_BUDGET, "cuda": CUDA_TOKEN_BUDGET}


def spec(**hyper: Any) -> JobSpec:
    return SPEC.model_copy(update={"hyperparameters": Hyperparameters(**hyper)})


def test_time_counts_every_evaluation_and_no_step_that_is_not_made() -> None:
    training, validation = TokenCounts(80, 0, 8_000, 4_000), TokenCounts(10, 0, 1_000, 500)
    measured = Calibration(100.0, 1.0)
    whole = estimate(spec(n_epochs=2), training, validation, measured, [])
    # Before, and after each of two epochs; an evaluated token costs half a trained one.
    assert (whole.total_steps, whole.tokens, whole.minutes) == (20, 16_000, round((16_000 + 1_500) / 100 / 60, 2))
    short = estimate(spec(n_epochs=2, max_steps=5), training, None, measured, [])
    assert (short.total_steps, short.tokens, short.supervised_tokens) == (5, 4_000, 2_000)
    split = estimate(spec(n_epochs=1, validation_split=0.25), training, None, measured, [])
    assert (split.total_steps, split.tokens) == (8, 6_000)
    with pytest.raises(InvalidRequest, match="leaves no row to train on"):
        estimate(spec(validation_split=0.5), TokenCounts(1, 0, 9, 3), None, measured, [])
    with pytest.raises(InvalidRequest, match="anything left"):
        estimate(spec(), TokenCounts(0, 9, 0, 0), None, measured, [])


def test_checkpoints_that_coincide_are_one() -> None:
    """3 epochs of 100 steps: the ends of the epochs are checkpoints every 50 and every 100 steps already."""
    training, validation, measured = TokenCounts(800, 0, 80_000, 40_000), TokenCounts(10, 0, 1_000, 500), 100.0

    def checkpoints(every: int | None) -> tuple[int, float | None]:
        found = estimate(spec(checkpoint_steps=every), training, validation, Calibration(measured, 1.0), [])
        return found.checkpoints, found.minutes

    def minutes(evaluations: int) -> float:
        return round((240_000 + 0.5 * 1_000 * evaluations) / measured / 60, 2)

    assert [checkpoints(every) for every in (50, 100, None, 70)] == [
        (6, minutes(7)),
        (3, minutes(4)),
        (3, minutes(4)),
        (7, minutes(8)),
    ]


def test_a_large_file_is_taken_to_be_like_its_beginning() -> None:
    tokens = MaskedTokens([1, 2, 3, 4], [False, False, True, True], cut=True)
    sample = [TokenisedRow(n, "instruction-v1", None if n == 2 else tokens) for n in range(1, 5)]
    assert count_tokens(iter(sample), 4) == TokenCounts(3, 1, 12, 6, (4, 4, 4), 3)
    assert count_tokens(iter(sample), 4_000) == TokenCounts(3_000, 1_000, 12_000, 6_000, (4, 4, 4), 3_000)
    # A text that fills three rows is one row of the file.
    text = [TokenisedRow(1, "completion-v1", tokens)] * 3
    assert count_tokens(iter(text), 100).rows == 300
    assert count_tokens(iter([]), 0) == TokenCounts(0, 0, 0, 0)


@pytest.mark.parametrize("device", BUDGETS)
@given(lengths=st.lists(st.integers(2, 700), min_size=1, max_size=60), batch_size=st.integers(1, 40))
def test_the_largest_micro_batch_is_near_the_trainers_own(
    device: DeviceKind, lengths: list[int], batch_size: int
) -> None:
    hyper, budget = Hyperparameters(batch_size=batch_size, n_epochs=3), BUDGETS[device]
    layout = plan_layout(np.asarray(lengths), hyper, 42, device)
    batches = [batch for step in range(layout.total_steps) for batch in layout.micro_batches(step)]
    actual = max(sum(lengths[row] for row in batch) for batch in batches)
    found = largest_micro_batch_tokens(lengths, batch_size, budget)
    assert max(lengths) <= found <= max(budget, max(lengths))
    # No step of any order is larger, and none smaller than its share.
    assert actual <= max(found, min(budget, sum(sorted(lengths)[-batch_size:])))
    if len(set(lengths)) == 1 and sum(lengths[:batch_size]) <= budget:
        assert found == actual


def test_on_a_gpu_the_shape_says_nothing_and_the_reason_is_given() -> None:
    training = TokenCounts(80, 0, 8_000, 4_000, (100,) * 80)

    def memory(device: DeviceKind | None, calibration: Calibration | None) -> tuple[float | None, str]:
        found = estimate(spec(), training, None, calibration, ["of the job"], SHAPE, device)
        first, *others = found.warnings
        assert (found.device, first) == (device, "of the job")
        assert (found.minutes is None) == (calibration is None)
        return found.peak_memory_mb, " ".join(others)

    of_shape, said = memory("cpu", None)
    assert (of_shape is not None, said) == (True, "")
    unknown, said = memory(None, None)
    assert unknown == of_shape
    assert "reckoned for a CPU" in said
    nothing, said = memory("cuda", None)
    assert nothing is None
    assert "no job of this base and precision has been trained on a GPU" in said
    # Eight rows of 100 tokens.
    alike = Calibration(1_000.0, 1.0, peaks=(MeasuredPeak(800, 10.0, 50.0),))
    assert memory("cuda", alike) == (50.0, "")
    others = Calibration(1_000.0, 1.0, peaks=(MeasuredPeak(399, 10.0, 50.0), MeasuredPeak(1_601, 10.0, 50.0)))
    nothing, said = memory("cuda", others)
    assert nothing is None
    assert "larger or smaller micro-batches" in said
    # What finished jobs took beyond a CPU's model is no GPU's.
    assert memory("cpu", alike)[0] == of_shape


def test_on_a_gpu_memory_grows_with_the_tokens_beside_the_base_up_to_its_budget() -> None:
    peaks = [MeasuredPeak(8_192, 1_000.0, 9_000.0)]
    at = [memory_on_gpu_mb(spec(batch_size=batch), (512,) * 400, peaks) for batch in (8, 16, 32, 64)]
    assert at == [5_000.0, 9_000.0, 17_000.0, 17_000.0]
    assert memory_on_gpu_mb(spec(), (), peaks) is None
    # Of the newest five that are near: 9,000 is the median of all.
    near = [MeasuredPeak(800, 0.0, peak) for peak in (1_000.0, 2_000.0, 3_000.0, 4_000.0, 5_000.0)]
    older = [MeasuredPeak(800, 0.0, 9_000.0)] * 9
    assert memory_on_gpu_mb(spec(batch_size=8), (100,) * 80, [*near, *older]) == 3_000.0
