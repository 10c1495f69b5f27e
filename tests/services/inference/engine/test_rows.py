"""How many sequences at once: what their keys and values really take, and what a GPU's free memory has room for."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine import rows
from services.inference.engine.choose_runner import products_of
from services.inference.engine.fused_lora import copied_bytes
from services.inference.engine.llama import LlamaRunner
from services.inference.engine.lora import LoraWeights
from services.inference.engine.lora_linear import linear_products
from services.inference.engine.rows import CPU_ROWS, MOST_GPU_ROWS, USUAL_RANK, default_rows, row_bytes, rows_that_fit
from services.inference.engine.transformers_runner import TransformersRunner
from tests.services.inference.harness import Tiny

CUDA = torch.device("cuda")


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 32))
def test_rows_take_no_more_than_half_and_one_is_always_tried(free: int, row: int) -> None:
    found = rows_that_fit(free, row)
    assert 1 <= found <= MOST_GPU_ROWS
    assert found == 1 or found * row <= free / 2
    assert found == MOST_GPU_ROWS or (found + 1) * row > free / 2


@pytest.mark.parametrize("runner", [LlamaRunner, TransformersRunner])
@pytest.mark.parametrize("context", [64, 1 << 19])
def test_a_row_takes_what_was_counted(tiny: Tiny, runner: Any, context: int) -> None:
    model = tiny.load().model
    sizes: dict[str, Any] = {"rows": 3, "context": context, "adapter_slots": 1}
    made = runner(model, **sizes) if runner is TransformersRunner else runner(model, precision="plain", **sizes)
    layers = made.cache.layers
    tensors = layers if runner is LlamaRunner else [part for layer in layers for part in (layer.keys, layer.values)]
    assert sum(tensor.nbytes for tensor in tensors) == 3 * row_bytes(model.config, context, made.dtype)


@pytest.mark.parametrize("runner", [LlamaRunner, TransformersRunner])
def test_a_row_s_copy_of_an_adapter_takes_what_was_counted(tiny: Tiny, runner: Any) -> None:
    """Two adapters in all layers, each in one of three rows: the copies are there as soon as one is loaded."""
    model = tiny.load().model
    sizes: dict[str, Any] = {"rows": 3, "context": 64, "adapter_slots": 2}
    counted = products_of(model) if runner is LlamaRunner else linear_products(model)
    expected = 3 * copied_bytes(counted, 16, torch.float32)
    made = runner(model, **sizes) if runner is TransformersRunner else runner(model, precision="plain", **sizes)
    pairs = {path: (torch.zeros(16, fan_in), torch.zeros(out, 16)) for path, (fan_in, out) in made.lora.modules.items()}
    made.lora.write(1, made.lora.prepare(LoraWeights(16, pairs)))
    assert sum(copies.a.nbytes + copies.b.nbytes for copies in made.lora._copies) == expected > 0


def test_a_cpu_has_a_fixed_number_and_a_gpu_what_it_has_room_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.load().model
    row = row_bytes(model.config, 128, torch.bfloat16) + copied_bytes(products_of(model), USUAL_RANK, torch.bfloat16)
    # A MOCK of a GPU's free memory: room for ten rows, and as much for other things.
    monkeypatch.setattr(rows, "free_gpu_bytes", lambda device: 20 * row + 1)
    assert default_rows(model, 128, torch.bfloat16, torch.device("cpu")) == CPU_ROWS
    assert default_rows(model, 128, torch.bfloat16, CUDA) == 10
    assert default_rows(model, 128, torch.float32, CUDA) == 5
    monkeypatch.setattr(rows, "free_gpu_bytes", lambda device: 1000 * row)
    assert default_rows(model, 128, torch.bfloat16, CUDA) == MOST_GPU_ROWS
