from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from services.trainer.model.forward import Packed, pack, training_forward
from services.trainer.model.lora import lora_attached, trainable
from services.trainer.model.precision import Precision, choose_precision
from services.trainer.recipe.checks import check_trained
from services.trainer.recipe.out_of_memory import out_of_memory_explained
from services.trainer.recipe.step import StepResult, make_optimizer, take_step
from shared.errors import JobFailed
from shared.jobs.spec import Hyperparameters
from tests.services.trainer.harness import CPU, TinyJob, ignore
from tests.services.trainer.model.test_forward import full_precision, ragged

FP32 = full_precision(torch.float32)


def step(model: Any, packs: list[Packed], precision: Precision = FP32, *, rate: float = 0.1, clip: float = 1e9) -> Any:
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, Hyperparameters())
    with training_forward(model, dropout=True):
        result = take_step(
            model,
            parameters,
            optimizer,
            packs,
            learning_rate=rate,
            max_grad_norm=clip,
            precision=precision,
            check=ignore,
        )
    return result, optimizer


PACKS = [pack(ragged([9, 4]), CPU), pack(ragged([7], seed=1), CPU)]


def test_a_step_counts_moves_b_and_keeps_fp32_moments(tiny: TinyJob) -> None:
    spec = tiny.spec()
    base, _ = tiny.bases.load(spec, torch.float32)
    with lora_attached(base.loaded.model, spec.lora, 1) as model:
        result, optimizer = step(model, PACKS)
        assert isinstance(result, StepResult)
        assert result.tokens == 20
        assert result.supervised_tokens == sum(len(packed.labels) for packed in PACKS)
        assert result.grad_norm > 0
        check_trained(model)
        states = optimizer.state_dict()["state"].values()
        assert {t.dtype for state in states for t in state.values()} == {torch.float32}
        assert all(p.grad is None for p in trainable(model).values())


def test_clipping_scales_the_whole_gradient(tiny: TinyJob) -> None:
    spec = tiny.spec()
    base, _ = tiny.bases.load(spec, torch.float32)
    moments = []
    for clip in (1e9, 1e-3):
        with lora_attached(base.loaded.model, spec.lora.model_copy(update={"dropout": 0.0}), 1) as model:
            result, optimizer = step(model, PACKS, clip=clip)
            # After one step Adam's first moment is a tenth of the gradient it was given.
            grads = [10 * state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
            moments.append(torch.cat([g.flatten() for g in grads]))
    assert float(moments[1].norm()) == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(moments[1] / 1e-3, moments[0] / result.grad_norm, rtol=1e-3, atol=1e-6)


def test_untrained_matrices_are_found(tiny: TinyJob) -> None:
    spec = tiny.spec()
    base, _ = tiny.bases.load(spec, torch.float32)
    with lora_attached(base.loaded.model, spec.lora, 1) as model:
        with pytest.raises(JobFailed, match="4 of 4 LoRA layers were not trained") as failure:
            check_trained(model)
        assert failure.value.code == "adapter_not_trained"


class Constant(nn.Module):
    """A model whose logits do not depend on its weights, or are not numbers."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": "sdpa"})()
        self.weight = nn.Parameter(torch.ones(1))
        self.value = value

    def forward(self, *, logits_to_keep: Tensor, **_: Any) -> Any:
        logits = torch.zeros(1, len(logits_to_keep), 97) + self.value
        return type("Output", (), {"logits": logits + 0 * self.weight})()


@pytest.mark.parametrize(
    ("value", "code"), [(float("nan"), "non_finite_loss"), (float("inf"), "non_finite_loss"), (1.0, "zero_gradient")]
)
def test_silent_failures_end_with_a_sentence_and_no_update(value: float, code: str) -> None:
    model = Constant(value)
    with pytest.raises(JobFailed) as failure:
        step(model, PACKS)
    assert failure.value.code == code
    assert "compute_dtype" in failure.value.message
    assert model.weight.detach().tolist() == [1]


def test_fp16_scales_skips_an_overflow_and_trains_on(tiny: TinyJob) -> None:
    """CPUs are not offered fp16 products; torch can do them, which is enough to see the scaler work."""
    spec = tiny.spec()
    base, _ = tiny.bases.load(spec, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    half = Precision(CPU, torch.float16, partial(torch.autocast, "cpu", torch.float16), scaler)
    with lora_attached(base.loaded.model, spec.lora, 1) as model:
        result, _ = step(model, PACKS, half)
        assert result.skipped
        assert scaler.get_scale() == 2.0**125
        assert not any(p.any() for name, p in trainable(model).items() if "lora_B" in name)
        scaler.update(2.0**10)
        result, _ = step(model, PACKS, half)
        assert not result.skipped
        check_trained(model)


def test_fp16_products_are_refused_on_a_cpu(tiny: TinyJob) -> None:
    with pytest.raises(JobFailed, match="needs a GPU"):
        choose_precision(tiny.spec(compute_dtype="fp16"), CPU)
    assert choose_precision(tiny.spec(), CPU).dtype == torch.float32
    bf16 = choose_precision(tiny.spec(compute_dtype="bf16"), CPU)
    with bf16.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert bf16.scaler is None
    with choose_precision(tiny.spec(compute_dtype="fp32"), CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_gpu_that_only_emulates_bf16_is_not_asked_for_it(tiny: TinyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(JobFailed, match="compute capability"):
        choose_precision(tiny.spec(compute_dtype="bf16"), torch.device("cuda"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_out_of_memory_says_what_to_change(error: Exception) -> None:
    with pytest.raises(JobFailed, match="lower max_length") as failure, out_of_memory_explained():
        raise error
    assert failure.value.code == "out_of_memory"


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_explained():
        raise RuntimeError("shape mismatch")
