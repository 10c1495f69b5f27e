"""Preparing a base once and loading it in a precision, on a tiny random Llama."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shared.bases.base_model import compute_dtype, load_base, memory_megabytes, prepare_base
from shared.bases.catalogue import Base
from shared.errors import ArtifactCorrupt, NotFound, TunesmithError
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import Manifest
from tests.tiny import prepared_tiny, tiny_catalogue, write_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalArtifactStore, Base, Manifest, Path]:
    root = tmp_path_factory.mktemp("base")
    return (*prepared_tiny(root), root / "tiny-model")


def test_preparing_happens_once(tiny: tuple[LocalArtifactStore, Base, Manifest, Path]) -> None:
    store, base, manifest, _ = tiny
    folder = store.base(base.id)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_base(base, store) == manifest
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert {"model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"} <= set(manifest.files)
    assert manifest.base_revision == base.revision
    assert manifest.versions["torch"] == torch.__version__.split("+")[0] or manifest.versions["torch"]


def test_two_at_once_prepare_one(tmp_path: Path) -> None:
    base = tiny_catalogue(write_tiny_model(tmp_path / "model")).get("tiny")
    store = LocalArtifactStore(tmp_path / "artifacts")
    manifests: list[Manifest] = []
    threads = [threading.Thread(target=lambda: manifests.append(prepare_base(base, store))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(manifests) == 3
    assert len({manifest.base_sha256 for manifest in manifests}) == 1
    assert not list((store.root / "staging").iterdir())


def test_fp32_is_the_source_to_the_bit(tiny: tuple[LocalArtifactStore, Base, Manifest, Path]) -> None:
    store, base, manifest, source = tiny
    loaded = load_base(base, store, "fp32", CPU)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, original(ids).logits, atol=0, rtol=0)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.sha256, loaded.quantized_layers) == (manifest.base_sha256, 0)
    # Tied weights count once.
    weights = sum(p.numel() * 4 for p in original.parameters())
    assert loaded.megabytes == pytest.approx(weights / 1e6, rel=0.01)


def test_int8_holds_every_decoder_linear_in_bytes(tiny: tuple[LocalArtifactStore, Base, Manifest, Path]) -> None:
    store, base, _, _ = tiny
    loaded = load_base(base, store, "int8", CPU)
    assert loaded.quantized_layers == 2 * 7
    full = load_base(base, store, "fp32", CPU)
    assert loaded.megabytes < full.megabytes / 1.5
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        difference = (loaded.model(ids).logits - full.model(ids).logits).abs().max()
    assert 0 < float(difference) < 0.05


def test_bf16_halves_the_memory(tiny: tuple[LocalArtifactStore, Base, Manifest, Path]) -> None:
    store, base, _, _ = tiny
    half, full = load_base(base, store, "bf16", CPU), load_base(base, store, "fp32", CPU)
    assert half.model.dtype == torch.bfloat16
    assert half.megabytes == pytest.approx(full.megabytes / 2, rel=0.01)
    assert memory_megabytes(half.model) == half.megabytes


def spoil(tmp_path: Path, change: str) -> tuple[LocalArtifactStore, Base]:
    """A base prepared from a source that was spoilt before."""
    model = write_tiny_model(tmp_path / "model")
    path = model / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, path, metadata={"format": "pt"})
    store, base = LocalArtifactStore(tmp_path / "artifacts"), tiny_catalogue(model).get("tiny")
    prepare_base(base, store)
    return store, base


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_corrupt(tmp_path: Path, change: str) -> None:
    """transformers would fill a missing weight with noise and go on."""
    store, base = spoil(tmp_path, change)
    with pytest.raises(ArtifactCorrupt, match="do not fit"):
        load_base(base, store, "fp32", CPU)


def test_unprepared_and_flipped_bases_are_not_loaded(tmp_path: Path) -> None:
    store, base, _ = prepared_tiny(tmp_path)
    weights = store.base(base.id) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match=r"model\.safetensors"):
        load_base(base, store, "fp32", CPU)
    store.remove(store.base(base.id))
    with pytest.raises(NotFound, match="tiny"):
        load_base(base, store, "fp32", CPU)


def test_a_source_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    for source in (f"folder:{tmp_path / 'nowhere'}", "package:no_such_package_of_ours/x.gguf"):
        with pytest.raises(TunesmithError, match="tiny"):
            prepare_base(Base(id="tiny", source=source), store)
    assert not (store.root / "bases").exists()


def test_compute_dtype_on_cpu_is_fp32_unless_named() -> None:
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("bf16", CPU) == torch.bfloat16
