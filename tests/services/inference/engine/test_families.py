"""Architectures outside our own forward pass run on transformers' behind the same engine: the same oracle, peft."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from services.inference.engine.interface import Finished
from services.inference.engine.llama import has_llama_architecture
from shared.bases.base_model import prepare_base
from shared.storage.artifacts import LocalArtifactStore
from tests.services.inference.adapters_on_disk import Oracle
from tests.services.inference.harness import EngineUnderTest, Tiny
from tests.tiny import tiny_catalogue, write_tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# Far shorter than the prompts.
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
# Architecture → its configuration, and layers that an adapter of it targets.
FAMILIES: dict[str, tuple[type[Any], dict[str, Any], tuple[str, ...]]] = {
    "llama with gelu": (LlamaConfig, {"hidden_act": "gelu"}, ("q_proj", "v_proj", "down_proj")),
    "llama with a rope that grows": (LlamaConfig, {"rope_parameters": DYNAMIC}, ("q_proj", "k_proj")),
    "gemma": (GemmaConfig, {"head_dim": 8}, ("q_proj", "o_proj", "gate_proj")),
    "gemma 2": (Gemma2Config, SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}, ("q_proj", "v_proj", "up_proj")),
    "gemma 3": (Gemma3TextConfig, SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}, ("q_proj", "k_proj")),
    "mistral 0.1": (MistralConfig, {"sliding_window": 8}, ("q_proj", "v_proj", "down_proj")),
    "qwen 2, sliding": (Qwen2Config, SLIDING | {"use_sliding_window": True}, ("q_proj", "v_proj", "down_proj")),
    "smollm 3": (SmolLM3Config, {"no_rope_layers": [1, 0]}, ("q_proj", "v_proj", "down_proj")),
    "phi 2": (PhiConfig, {}, ("q_proj", "dense", "fc1")),
    "phi 3, sliding": (Phi3Config, {"sliding_window": 8}, ("qkv_proj", "gate_up_proj", "o_proj")),
    "granite": (GraniteConfig, {}, ("q_proj", "v_proj", "up_proj")),
    "olmo 2": (Olmo2Config, {}, ("q_proj", "v_proj", "down_proj")),
    "phi 3": (Phi3Config, {}, ("qkv_proj", "gate_up_proj", "o_proj")),
    "stablelm": (StableLmConfig, {}, ("q_proj", "v_proj", "down_proj")),
    "starcoder 2": (Starcoder2Config, {"use_bias": True}, ("q_proj", "v_proj", "c_fc")),
}
PROMPTS = ["def f(x): return x", "The quick brown fox jumps over the lazy dog. " * 2, "äöü 你好 🎉", "a"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, list[str]]:
    """A prepared base of the architecture, and adapters of it."""
    kind, changes, targets = FAMILIES[request.param]
    root = tmp_path_factory.mktemp("family")
    # Its tokenizer stays; the model is another.
    folder = write_tiny_model(root / "model")
    vocabulary = LlamaConfig.from_pretrained(folder).vocab_size
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | {"vocab_size": vocabulary} | changes), dtype=torch.float32)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # At their initial size all layers say next to nothing beside the embedding.
            if parameter.ndim == 2 and "embed" not in path:
                parameter.normal_(0, 0.1)
    assert not has_llama_architecture(model)
    model.save_pretrained(folder)
    store, base = LocalArtifactStore(root / "artifacts"), tiny_catalogue(folder).get("tiny")
    tiny = Tiny(store, base, prepare_base(base, store), folder, Oracle(store, folder))
    return tiny, [tiny.adapter(seed=1, targets=targets), tiny.adapter(seed=2, r=2, targets=targets[:1], rslora=True)]


@pytest.fixture
def under_test(family: tuple[Tiny, list[str]]) -> Iterator[EngineUnderTest]:
    tiny, adapters = family
    under_test = EngineUnderTest(tiny, own=False, rows=4, chunk=7)
    for adapter in adapters:
        under_test.load(adapter)
    yield under_test
    under_test.engine.close()


def test_mixed_rows_say_what_peft_says(family: tuple[Tiny, list[str]], under_test: EngineUnderTest) -> None:
    tiny, adapters = family
    chance = random.Random(1)
    work = [
        (chance.choice([None, *adapters]), under_test.prompt(chance.choice(PROMPTS)), chance.randint(1, 20))
        for _ in range(16)
    ]
    heard = [under_test.submit(prompt, adapter=adapter, max_new_tokens=n) for adapter, prompt, n in work]
    for (adapter, prompt, n), each in zip(work, heard, strict=True):
        assert isinstance(each.last, Finished), each.last
        assert each.ids == tiny.oracle.ids(adapter, prompt, n)
    first = under_test.prompt(PROMPTS[0])
    assert len({tuple(tiny.oracle.ids(adapter, first, 20)) for adapter in [None, *adapters]}) == 3
