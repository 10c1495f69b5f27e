"""Bases of the families that people fine-tune: packed samples train as each sample by itself does under plain peft."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from services.trainer.model.attention import attend_per_sample
from services.trainer.model.forward import Sample, loss_sum, pack
from services.trainer.model.llama import fuse
from services.trainer.model.lora import lora_attached, trainable
from shared.jobs.spec import LoraSpec
from tests.rounding import close, rounding
from tests.services.trainer.harness import CPU

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
ATTENTION = ("q_proj", "k_proj", "v_proj")
# Family → its configuration, what differs from `SIZES`, and layers that an adapter of it targets.
FAMILIES: dict[str, tuple[type[Any], dict[str, Any], tuple[str, ...]]] = {
    "qwen 2.5": (Qwen2Config, {}, (*ATTENTION, "down_proj")),
    "qwen 2, sliding": (Qwen2Config, SLIDING | {"use_sliding_window": True}, ATTENTION),
    "qwen 3": (Qwen3Config, {"head_dim": 16}, (*ATTENTION, "o_proj")),
    "gemma": (GemmaConfig, {"head_dim": 8}, (*ATTENTION, "gate_proj")),
    "gemma 2": (Gemma2Config, SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}, ATTENTION),
    "gemma 3": (Gemma3TextConfig, SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}, ATTENTION),
    "phi 2": (PhiConfig, {}, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "phi 3": (Phi3Config, {"sliding_window": 8}, ("qkv_proj", "gate_up_proj", "o_proj")),
    "mistral": (MistralConfig, {"sliding_window": None}, ATTENTION),
    "mistral 0.1": (MistralConfig, {"sliding_window": 8}, ATTENTION),
    "smollm 3": (SmolLM3Config, {"no_rope_layers": [1, 0]}, ATTENTION),
    "granite": (GraniteConfig, {}, ATTENTION),
    "olmo 2": (Olmo2Config, {}, ATTENTION),
    "stablelm": (StableLmConfig, {}, ATTENTION),
    "starcoder 2": (Starcoder2Config, {"use_bias": True, "sliding_window": 8}, (*ATTENTION, "c_fc")),
}
# Embedding to loss and back, through two layers: each reads what the one before it has summed.
SUMS = [64] * 40


def random_base(name: str) -> Any:
    kind, changes, _ = FAMILIES[name]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | changes), dtype=torch.float32)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # At their initial size all layers say next to nothing beside the embedding.
            if parameter.ndim == 2 and "embed" not in path:
                parameter.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


def samples() -> list[Sample]:
    draw = np.random.default_rng(1)
    return [
        (draw.integers(3, VOCABULARY, length).astype(np.int64), np.arange(length) >= max(1, length // 3))
        for length in (17, 5, 40, 2, 23)
    ]


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad.clone() for p in trainable(model).values() if p.grad is not None]
    for parameter in trainable(model).values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_samples_have_the_loss_and_the_gradients_of_each_alone(name: str) -> None:
    base, targets = random_base(name), FAMILIES[name][2]
    # As a worker makes a base ready.
    attend_per_sample(base)
    fuse(base, torch.float32)
    with lora_attached(base, LoraSpec(dropout=0, target_modules=targets), 7) as model:
        for path, parameter in trainable(model).items():
            if ".lora_B." in path:
                torch.nn.init.normal_(parameter, std=0.05)
        expected = torch.zeros(())
        for ids, supervised in samples():
            labels = torch.tensor(np.where(supervised, ids, -100))[None]
            loss = model(input_ids=torch.tensor(ids)[None], labels=labels).loss * int(supervised.sum())
            torch.autograd.backward([loss])
            expected = expected + loss.detach()
        alone = gradients(model)
        together = loss_sum(model, pack(samples(), CPU))
        torch.autograd.backward([together])
        bound = rounding(torch.float32, SUMS)
        assert close(together, expected, bound)
        packed = gradients(model)
        assert len(packed) == len(alone) == 2 * 2 * len(targets)
        largest = max(float(gradient.norm()) for gradient in alone)
        for actual, wanted in zip(packed, alone, strict=True):
            assert close(actual, wanted, bound, at_least=largest)
