import numpy as np
import pytest
import torch
from torch import nn

from services.trainer.model.forward import pack, supervised_logits
from services.trainer.model.mixed_precision import MixedPrecisionLinear, compute_in_fp32
from shared.jobs.spec import BasePrecision
from tests.rounding import close, llama_sums, rounding
from tests.services.trainer.harness import CPU, TinyJob


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_product_with_the_cast_weight_in_both_directions(dtype: torch.dtype) -> None:
    layer = nn.Linear(7, 5).to(dtype).requires_grad_(False)
    oracle = nn.Linear(7, 5)
    oracle.load_state_dict({name: t.float() for name, t in layer.state_dict().items()})
    compute_in_fp32(layer)
    assert isinstance(layer, MixedPrecisionLinear)
    ours, theirs = (torch.arange(21.0).reshape(3, 7).requires_grad_() for _ in range(2))
    layer(ours).square().sum().backward()
    oracle(theirs).square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert close(ours.grad, theirs.grad, rounding(torch.float32, [7, 5]))
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_half_precision_base_computes_in_fp32_at_half_the_memory(tiny: TinyJob, precision: BasePrecision) -> None:
    packed = pack([(np.arange(9), np.arange(9) > 0)], CPU)
    half = tiny.bases.load(tiny.spec(base_precision=precision), torch.float32)[0].loaded
    dtype = half.model.lm_head.weight.dtype
    exact = tiny.bases.load(tiny.spec(base_precision="fp32"), torch.float32)[0].loaded
    assert half.megabytes < 0.6 * exact.megabytes
    rounded = exact.model
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype))
        bound = rounding(torch.float32, llama_sums(rounded.config, 9))
        assert close(supervised_logits(half.model, packed), supervised_logits(rounded, packed), bound)
