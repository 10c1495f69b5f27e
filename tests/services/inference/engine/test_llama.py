"""Our own forward pass against transformers', for every architecture it takes and every way of holding weights."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from services.inference.engine.llama import LlamaRunner, has_llama_architecture
from services.inference.engine.packed import PACKED, PackedPrecision, unusable

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases, tied": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "llama 3 rope": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "one head for all": LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "a head each": LlamaConfig(**SIZES | {"num_key_value_heads": 6}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**{key: value for key, value in SIZES.items() if key != "head_dim"}),
    "qwen3": Qwen3Config(**SIZES | {"head_dim": 16}),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # Biases and norms at their initial zeros and ones would hide a mistake; wide weights make attention sharp.
            parameter.normal_(1 if "norm" in path else 0, 0.3 if parameter.ndim == 1 else 0.15)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers(name: str) -> None:
    """A prompt in two pieces, then rows at different positions decoding together."""
    model = model_of(name)
    assert has_llama_architecture(model)
    runner = LlamaRunner(model, precision="plain", rows=3, context=64, adapter_slots=1)
    prompts = [torch.randint(0, 300, (length,)).tolist() for length in (20, 7, 33)]
    with torch.inference_mode():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
        for row, (prompt, logits) in enumerate(zip(prompts, expected, strict=True)):
            runner.prefill(row, prompt[:3], 0, 0, all_logits=False)
            mine = runner.prefill(row, prompt[3:-1], 3, 0, all_logits=True)
            torch.testing.assert_close(mine, logits[3:-1], atol=3e-5, rtol=3e-5)
        together = runner.decode(
            0, [prompt[-1] for prompt in prompts], [len(prompt) - 1 for prompt in prompts], [0, 0, 0]
        )
        torch.testing.assert_close(together, torch.stack([logits[-1] for logits in expected]), atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("precision", PACKED)
def test_packed_weights_compute_nearly_the_same(precision: PackedPrecision) -> None:
    """fp16 keeps 11 bits of a weight, int8 7, bf16 8; what differs more is a mistake, not rounding."""
    if reason := unusable(precision):
        pytest.skip(reason)
    model = model_of("qwen2")
    ids = torch.randint(0, 300, (30,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
        runner = LlamaRunner(model, precision=precision, rows=1, context=64, adapter_slots=1)
        logits = runner.prefill(0, ids, 0, 0, all_logits=True)
    difference = float((logits - expected).norm() / expected.norm())
    assert difference < {"plain": 1e-5, "fp16w": 2e-3, "bf16w": 3e-2, "int8w": 5e-2}[precision]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, hidden_act="gelu"),
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
        MistralConfig(**SIZES, sliding_window=16),
    ],
)
def test_what_it_does_not_compute_is_left_to_transformers(config: Any) -> None:
    assert not has_llama_architecture(AutoModelForCausalLM.from_config(config))
