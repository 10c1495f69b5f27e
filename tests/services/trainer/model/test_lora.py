from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.trainer.model.fingerprint import fingerprint
from services.trainer.model.lora import lora_attached, parameter_counts, trainable
from shared.errors import JobFailed
from shared.jobs.spec import PRESETS, BasePrecision, LoraSpec
from tests.services.trainer.harness import TinyJob

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINYLLAMA_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("shape", "trained", "total"),
    [(SMOLLM2_135M, 460_800, 134_975_808), (TINYLLAMA_1B, 1_126_400, 1_100_048_384 + 1_126_400)],
    ids=["SmolLM2-135M", "TinyLlama-1.1B"],
)
def test_reference_trains_exactly_these_parameters(shape: dict[str, Any], trained: int, total: int) -> None:
    """Shapes only, on the meta device. The tutorial's "~4M" for TinyLlama is 1,126,400."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
        model.requires_grad_(False)
        with lora_attached(model, PRESETS["reference"].lora, 42) as peft_model:
            assert parameter_counts(peft_model) == (trained, total)


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp16", "fp32"])
def test_weights_are_fp32_start_from_the_seed_and_leave_no_trace(tiny: TinyJob, precision: BasePrecision) -> None:
    base, _ = tiny.bases.load(tiny.spec(base_precision=precision), torch.float32)
    model = base.loaded.model
    names = [name for name, _ in model.named_modules()]
    drawn = []
    for seed in (1, 1, 2):
        torch.rand(3)  # what the worker did before has no influence
        with lora_attached(model, LoraSpec(), seed) as peft_model:
            weights = trainable(peft_model)
            assert len(weights) == 2 * 2 * 2
            assert {p.dtype for p in weights.values()} == {torch.float32}
            assert all(not p.any() for name, p in weights.items() if ".lora_B." in name)
            drawn.append(torch.cat([p.detach().flatten() for p in weights.values()]))
        assert [name for name, _ in model.named_modules()] == names
        assert not trainable(model)
        assert not hasattr(model, "peft_config")
        assert fingerprint(model) == base.fingerprint
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_detaches_when_the_job_breaks_off(tiny: TinyJob) -> None:
    base, _ = tiny.bases.load(tiny.spec(), torch.float32)
    model = base.loaded.model
    with pytest.raises(RuntimeError, match="broke"), lora_attached(model, LoraSpec(), 1):
        raise RuntimeError("broke")
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_unknown_target_modules_are_named(tiny: TinyJob) -> None:
    spec = tiny.spec(lora=LoraSpec(target_modules=("q_proj", "c_attn")))
    with pytest.raises(JobFailed, match=r"no linear layers called c_attn; it has .*q_proj") as failure:
        tiny.run(spec)
    assert failure.value.code == "invalid_target_modules"
