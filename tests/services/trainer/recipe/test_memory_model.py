"""The memory model of `shared.training.memory`: its pieces against what a real (tiny) model saves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.trainer.model.bases import WarmBases
from services.trainer.model.forward import loss_sum, pack, training_forward
from services.trainer.model.lora import lora_attached
from shared.bases.base_model import prepare_base
from shared.bases.catalogue import Catalogue
from shared.jobs.spec import BasePrecision, JobSpec, LoraSpec
from shared.storage.artifacts import LocalArtifactStore
from shared.training.memory import ModelShape, model_shape, peak_memory_mb, saved_activation_bytes
from tests.tiny import prepared_tiny, tiny_catalogue, write_tiny_model

CPU = torch.device("cpu")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMOLLM2 = ModelShape(30, 576, 1536, 576, 192, 49152, tied=True)


@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(dropout=0),
        LoraSpec(),
        LoraSpec(r=16, dropout=0, target_modules=ALL),
        LoraSpec(dropout=0.1, target_modules=("o_proj", "down_proj")),
    ],
)
def test_what_a_token_saves_in_a_layer_is_what_autograd_saves(tmp_path: Path, lora: LoraSpec) -> None:
    few, many, tokens = 2, 5, 60
    counted = (saved_bytes(tmp_path, lora, many, tokens) - saved_bytes(tmp_path, lora, few, tokens)) / (many - few)
    shape = ModelShape(2, 32, 64, 32, 16, 400, tied=True)
    # Beside these: one number of each norm and head, and attention's own sums.
    assert counted / tokens == pytest.approx(saved_activation_bytes(shape, lora), rel=0.03)


def saved_bytes(root: Path, lora: LoraSpec, layers: int, tokens: int) -> int:
    """Bytes of everything that torch saves for the backward pass of one sample, weights not counted."""
    model = write_tiny_model(root / f"model-{layers}", layers=layers)
    store, base = LocalArtifactStore(root / f"artifacts-{layers}"), tiny_catalogue(model).get("tiny")
    prepare_base(base, store)
    spec = JobSpec(
        base="tiny", base_revision=base.revision, training_file="f", training_sha256="s", base_precision="fp32"
    )
    loaded = WarmBases(Catalogue((base,)), store, CPU).load(spec, torch.float32)[0].loaded
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # Itself, a function's output would hold its graph for ever.
        return tensor.detach()

    sample = np.arange(3, 3 + tokens), np.arange(tokens) > tokens - 3
    with lora_attached(loaded.model, lora, 1) as adapted, training_forward(adapted, dropout=True):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_sum(adapted, pack([sample], CPU))
        weights = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    return sum(size for at, size in sizes.items() if at not in weights)


def test_it_grows_linearly_and_lora_and_precision_count() -> None:
    def mb(precision: BasePrecision = "int8", tokens: int = 1024, **lora: Any) -> float:
        return peak_memory_mb(SMOLLM2, precision, LoraSpec(**lora), tokens)

    assert mb(tokens=2048) - mb(tokens=1024) == pytest.approx(mb(tokens=1024) - mb(tokens=0))
    assert mb("nf4") < mb("int8") < mb("fp32")
    assert mb(target_modules=ALL, r=16, dropout=0) > mb()
    assert mb(use_rslora=True) == mb()


def test_the_shape_is_read_from_a_llamas_configuration_only(tmp_path: Path) -> None:
    store, base, _ = prepared_tiny(tmp_path)
    config = json.loads((store.base(base.id) / "config.json").read_text())
    assert model_shape(config) == ModelShape(2, 32, 64, 32, 16, config["vocab_size"], config["tie_word_embeddings"])
    assert model_shape(config | {"model_type": "gpt2"}) is None
    assert model_shape({key: value for key, value in config.items() if key != "head_dim"}) == model_shape(config)
