"""From settings to a service: the base is prepared, loaded in its precision, and serves adapters in it."""

import asyncio
from pathlib import Path

import pytest

from services.inference.build import build_serving
from services.inference.engine import packed
from services.inference.engine.interface import GenerationRequest
from services.inference.generation import PromptRequest
from services.inference.precision import ServingPrecision
from services.inference.prompts import RawText
from services.inference.serving import Serving
from services.inference.settings import InferenceSettings
from shared.errors import NotFound, TunesmithError
from shared.processor import Processor, this_processor
from shared.storage.artifacts import LocalArtifactStore
from tests.services.inference.adapters_on_disk import write_adapter
from tests.tiny import tiny_catalogue, write_tiny_model

NEEDS_BF16 = pytest.mark.skipif(not this_processor().converts_bf16, reason=f"no bf16: {this_processor()}")


async def texts(serving: Serving, names: list[str | None]) -> list[str]:
    async def one(name: str | None) -> str:
        asked = PromptRequest([RawText("def f(x): return x")], name, GenerationRequest(()), 12)
        async with serving.generate(asked) as generation:
            return "".join([each.tokens[-1].text async for each in generation.progress()])

    answers = await asyncio.gather(*(one(name) for name in names))
    await serving.close()
    return list(answers)


@pytest.mark.parametrize(
    ("requested", "served", "dtype"),
    [
        ("fp32", {"fp32"}, "float32"),
        ("fp16w", {"fp16w"}, "float32"),
        ("int8", {"int8w"}, "float32"),
        pytest.param("bf16w", {"bf16w"}, "float32", marks=NEEDS_BF16),
        ("bf16", {"bf16"}, "bfloat16"),
        ("nf4", {"nf4"}, "float32"),
        ("auto", {"fp32", "fp16w", "bf16w", "int8w"}, "float32"),
    ],
)
def test_each_precision_serves_base_and_adapters(
    tmp_path: Path, requested: ServingPrecision, served: set[str], dtype: str
) -> None:
    model = write_tiny_model(tmp_path / "model", hidden=64)
    store, catalogue = LocalArtifactStore(tmp_path / "artifacts"), tiny_catalogue(model)
    serving = build_serving(InferenceSettings(precision=requested, slots=4, context=64), store, catalogue)
    assert serving.base.id == "tiny"
    assert serving.base.aliases == ("test/tiny-llama",)
    assert serving.base.precision in served
    assert serving.base.dtype == dtype
    # bitsandbytes' layers are no plain tensors.
    assert serving.base.runner == ("transformers" if requested == "nf4" else "llama")
    assert bool(serving.base.measured) == (requested == "auto")
    manifest = store.verify(store.base("tiny"), "base")
    adapter = write_adapter(store, model, manifest, seed=1)
    base, tuned, again = asyncio.run(texts(serving, [None, adapter, None]))
    assert base == again != tuned


def test_a_base_by_alias_and_an_unknown_one(tmp_path: Path) -> None:
    catalogue = tiny_catalogue(write_tiny_model(tmp_path / "model"))
    store = LocalArtifactStore(tmp_path / "artifacts")
    serving = build_serving(InferenceSettings(base="test/tiny-llama", context=64), store, catalogue)
    assert serving.base.id == "tiny"
    asyncio.run(serving.close())
    with pytest.raises(NotFound):
        build_serving(InferenceSettings(base="unknown"), store, catalogue)


def test_a_precision_that_the_processor_lacks_is_refused_before_the_base_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "this_processor", lambda: Processor("Some CPU", frozenset({"avx2"})))
    store = LocalArtifactStore(tmp_path / "artifacts")
    with pytest.raises(TunesmithError, match=r"bf16w does not run on this processor.*there are auto, fp32, fp16w"):
        build_serving(InferenceSettings(precision="bf16w"), store, tiny_catalogue(tmp_path / "nowhere"))
    assert not store.base("tiny").exists()


def test_an_architecture_the_engine_does_not_know_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    config = model / "config.json"
    # Its weights are a Llama's; nobody has looked at the rest of it.
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "helium"'))
    store = LocalArtifactStore(tmp_path / "artifacts")
    with pytest.raises(TunesmithError, match="does not serve"):
        build_serving(InferenceSettings(context=64), store, tiny_catalogue(model))
