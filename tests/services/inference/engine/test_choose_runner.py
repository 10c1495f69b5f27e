"""A precision asked for by name: loaded as what, refused where the processor or the device has none."""

from typing import Any, get_args

import pytest

from services.inference.engine import choose_runner as choose
from services.inference.engine import packed, probe
from services.inference.engine.choose_runner import choose_runner, precision_to_load
from services.inference.engine.probe import Measured
from services.inference.precision import ServingPrecision
from shared.errors import TunesmithError
from tests.services.inference.engine.test_packed import AVX2_ONLY
from tests.services.inference.harness import Tiny

SIZES: dict[str, Any] = {"rows": 2, "context": 64, "adapter_slots": 1}


def test_what_a_base_is_loaded_as(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "unusable", lambda precision: None)
    on_cpu = {each: precision_to_load(each, "cpu") for each in get_args(ServingPrecision)}
    packed_here = dict.fromkeys(("auto", "fp32", "fp16w", "bf16w", "int8w", "int8"), "fp32")
    assert on_cpu == packed_here | {"bf16": "bf16", "fp16": "fp16", "nf4": "nf4"}
    assert precision_to_load("auto", "cuda", "fp16") == "fp16"
    assert precision_to_load("int8", "cuda") == "int8"


def test_a_precision_that_the_processor_lacks_is_refused_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "this_processor", lambda: AVX2_ONLY)
    with pytest.raises(TunesmithError) as refused:
        precision_to_load("bf16w", "cpu")
    assert refused.value.code == "unsupported_precision"
    assert refused.value.message.startswith("precision bf16w does not run on this processor: bf16 weights need AVX-512")
    assert refused.value.message.endswith("there are auto, fp32, fp16w, int8w, bf16, fp16, int8, nf4")


@pytest.mark.parametrize("requested", ["fp16w", "bf16w", "int8w"])
def test_a_precision_for_cpus_is_refused_on_a_gpu(requested: ServingPrecision) -> None:
    with pytest.raises(TunesmithError, match=f"{requested} is for CPUs"):
        precision_to_load(requested, "cuda")


def test_a_kernel_that_raises_on_the_model_itself_is_a_sentence(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.load()

    def broken(weight: Any, bias: Any) -> Any:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setitem(packed._KINDS, "fp16w", broken)
    with pytest.raises(TunesmithError, match="fp16w does not run on this processor: could not create") as refused:
        choose_runner(loaded.model, "fp32", "fp16w", loaded.tokenizer, **SIZES)
    assert refused.value.code == "unsupported_precision"


def test_auto_falls_back_to_plain_weights_when_the_choice_fails(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.load()

    def measure(*_: Any) -> list[Measured]:
        # The probe's runner worked; the one that serves has more rows and does not.
        monkeypatch.setitem(packed._KINDS, "fp16w", broken)
        return [Measured("plain", {1: 9.0}, 9.0, 3.0, 0.0), Measured("fp16w", {1: 1.0}, 1.0, 3.0, 0.0)]

    def broken(weight: Any, bias: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(probe, "measure", measure)
    chosen = choose_runner(loaded.model, "fp32", "auto", loaded.tokenizer, **SIZES)
    assert (chosen.precision, chosen.backend) == ("fp32", "llama")


def test_auto_starts_whatever_raises(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.load()

    def broken(weight: Any, bias: Any) -> Any:
        raise RuntimeError("could not create a primitive")

    for precision in ("fp16w", "bf16w", "int8w"):
        monkeypatch.setitem(packed._KINDS, precision, broken)
    chosen = choose_runner(loaded.model, "fp32", "auto", loaded.tokenizer, **SIZES)
    assert (chosen.precision, chosen.backend) == ("fp32", "llama")
    assert [each.precision for each in chosen.measured] == ["plain"]
