"""The fused Llama against transformers' and peft's own forward and autograd, whatever the base is held in."""

from typing import Any

import pytest
import torch

from services.trainer.model.forward import loss_sum, pack, supervised_logits, training_forward
from services.trainer.model.llama import FusedLlama, fuse, fused_form
from services.trainer.model.lora import lora_attached, trainable
from shared.jobs.spec import BasePrecision, LoraSpec
from tests.rounding import close, llama_sums, rounding
from tests.services.trainer.harness import CPU, TinyJob
from tests.services.trainer.model.test_forward import LENGTHS, ragged, random_llama

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def bounds(config: Any, dtype: torch.dtype) -> tuple[float, float]:
    """What rounding may make of the loss and of the gradients, relative to their norms."""
    forward, backward = (llama_sums(config, max(LENGTHS), backward=back) for back in (False, True))
    return rounding(dtype, forward), rounding(dtype, [*backward, sum(LENGTHS)])


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for parameter in trainable(model).values():
        parameter.grad = None
    with training_forward(model, dropout=True):
        loss = loss_sum(model, pack(ragged(LENGTHS), CPU))
        torch.autograd.backward(loss)
    return loss.detach(), {name: p.grad for name, p in trainable(model).items() if p.grad is not None}


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("k_proj", "down_proj")])
def test_loss_and_gradients_are_those_of_transformers(targets: tuple[str, ...]) -> None:
    base: Any = random_llama()
    fuse(base, torch.float32)
    fused = base.fused
    with lora_attached(base, LoraSpec(dropout=0, target_modules=targets, use_rslora=True), 7) as model:
        for name, parameter in trainable(model).items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.to(torch.float64)
        loss, gradients = loss_and_gradients(model)
        base.fused = None
        assert fused_form(model) is None
        expected_loss, expected = loss_and_gradients(model)
        base.fused = fused
    loss_bound, gradient_bound = bounds(base.config, torch.float64)
    assert close(loss, expected_loss, loss_bound)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * 2 * len(targets)
    for name, gradient in gradients.items():
        assert close(gradient, expected[name], gradient_bound), name


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp16", "fp32"])
def test_every_precision_computes_what_its_layers_do(tiny: TinyJob, precision: BasePrecision) -> None:
    base, _ = tiny.bases.load(tiny.spec(base_precision=precision), torch.float32)
    model = base.loaded.model
    assert isinstance(fused_form(model), FusedLlama)
    with lora_attached(model, LoraSpec(dropout=0, target_modules=ALL), 7) as peft_model:
        for name, parameter in trainable(peft_model).items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
        loss, gradients = loss_and_gradients(peft_model)
        fused, model.fused = model.fused, None
        expected_loss, expected = loss_and_gradients(peft_model)
        model.fused = fused
    loss_bound, gradient_bound = bounds(model.config, torch.float32)
    assert close(loss, expected_loss, loss_bound)
    for name, gradient in gradients.items():
        assert close(gradient, expected[name], gradient_bound), name


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp32"])
def test_bf16_products_stay_close_to_fp32(tiny: TinyJob, precision: BasePrecision) -> None:
    base, _ = tiny.bases.load(tiny.spec(base_precision=precision), torch.bfloat16)
    model, found = base.loaded.model, {}
    with lora_attached(model, LoraSpec(dropout=0, target_modules=ALL), 7) as peft_model:
        for name, parameter in trainable(peft_model).items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
        for dtype in (torch.bfloat16, torch.float32):
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                assert isinstance(fused_form(peft_model), FusedLlama)
                found[dtype] = loss_and_gradients(peft_model)
            model.fused = FusedLlama(model, torch.float32)
    (loss, gradients), (near_loss, near) = found[torch.float32], found[torch.bfloat16]
    assert near_loss != loss
    torch.testing.assert_close(near_loss, loss, rtol=1e-3, atol=0)
    for name, gradient in gradients.items():
        assert near[name].dtype == torch.float32
        assert float((near[name] - gradient).norm()) <= 3e-2 * float(gradient.norm()), name


def test_logits_are_those_the_loss_is_made_of() -> None:
    base: Any = random_llama()
    fuse(base, torch.float32)
    packed = pack(ragged(LENGTHS), CPU)
    with torch.no_grad():
        logits = supervised_logits(base, packed)
        expected = torch.nn.functional.cross_entropy(logits, packed.labels, reduction="sum")
        assert close(loss_sum(base, packed), expected, bounds(base.config, torch.float32)[0])


def test_what_is_not_known_to_be_the_same_function_stays_transformers_own() -> None:
    base: Any = random_llama()
    fuse(base, torch.float32)
    assert isinstance(fused_form(base), FusedLlama)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_form(base) is None
    base.fused.dtype = torch.bfloat16
    assert fused_form(base) is None
    base.fused.dtype = torch.float32
    with lora_attached(base, LoraSpec(target_modules=("q_proj", "lm_head")), 1) as model:
        assert fused_form(model) is None
    other: Any = random_llama()
    other.config.hidden_act = "gelu"
    fuse(other, torch.float32)
    assert fused_form(other) is None
