"""int8 layers as a GPU trains through them; the device does not matter to what they compute, so CPUs test it."""

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.model.dequantised import DequantisedLinear, multiply_dequantised
from services.trainer.model.frozen import row_scales
from services.trainer.model.lora import lora_attached, trainable
from shared.jobs.spec import LoraSpec

SPIKE = 40.0


def int8_layer(*, bias: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    plain = nn.Linear(64, 48, bias=bias)
    layer = Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer.to("cpu")).requires_grad_(False)


def dequantised(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.data.float() * row_scales(layer)[:, None]
    return weight


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_product_with_the_dequantised_weight_in_both_directions(bias: bool) -> None:
    model = int8_layer(bias=bias)
    multiply_dequantised(model)
    assert type(model[0]) is DequantisedLinear
    ours, theirs = (torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    ours, theirs = ours.requires_grad_(), theirs.requires_grad_()
    product = model(ours)
    oracle = functional.linear(theirs, dequantised(model[0]), model[0].bias)
    torch.testing.assert_close(product, oracle)
    product.square().sum().backward()
    oracle.square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_under_autocast_both_directions_are_half_precision_products() -> None:
    model = int8_layer()
    multiply_dequantised(model)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product = model(x)
    assert product.dtype == torch.bfloat16
    product.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    weight = dequantised(model[0]).bfloat16()
    expected = (2 * (x.detach().bfloat16() @ weight.T).float()).bfloat16() @ weight
    torch.testing.assert_close(x.grad, expected.float())


def test_a_row_does_not_change_with_the_rows_beside_it() -> None:
    """bitsandbytes' product takes a column out of all rows as soon as one of them has an outlier in it."""
    quiet = torch.randn(2, 64)
    spiky = torch.cat([quiet, torch.full((1, 64), SPIKE)])
    theirs, ours = int8_layer().eval(), int8_layer()
    multiply_dequantised(ours)
    assert not torch.allclose(theirs(quiet), theirs(spiky)[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(quiet), ours(spiky)[:2])


def test_layers_share_one_buffer_and_each_finds_its_own_weight() -> None:
    model = nn.Sequential(*(int8_layer(seed=seed)[0] for seed in (1, 2)))
    multiply_dequantised(model)
    first, second = model
    assert first.buffer is second.buffer
    x = torch.randn(3, 64, requires_grad=True)
    (first(x).sum() + second(x).sum()).backward()
    assert x.grad is not None
    expected = (dequantised(first).sum(0) + dequantised(second).sum(0)).expand(3, 64)
    torch.testing.assert_close(x.grad, expected)


def test_peft_trains_lora_on_it_and_leaves_it_as_it_was() -> None:
    from tests.services.trainer.model.test_forward import random_llama

    model: Any = random_llama()
    model.model.layers[0].self_attn.q_proj = Linear8bitLt(32, 32, bias=False, has_fp16_weights=False).to("cpu")
    model.requires_grad_(False)
    model.is_loaded_in_8bit = True
    multiply_dequantised(model)
    layer = model.model.layers[0].self_attn.q_proj
    with lora_attached(model, LoraSpec(target_modules=("q_proj",), dropout=0), 1) as tuned:
        loss = tuned(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
        loss.backward()
        grads = {name: p.grad for name, p in trainable(tuned).items()}
        assert any("layers.0.self_attn.q_proj.lora_B" in name for name in grads)
        assert all(grad is not None for grad in grads.values())
    assert model.model.layers[0].self_attn.q_proj is layer
    assert type(layer) is DequantisedLinear
