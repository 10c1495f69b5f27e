"""The choice of a precision: measured on this machine, and only among those that run here and keep the loss."""

import math
from typing import Any

import pytest

from services.inference.engine import packed, probe
from services.inference.engine.llama import LlamaRunner
from services.inference.engine.packed import PackedPrecision
from services.inference.engine.probe import Measured, fastest, measure
from tests.services.inference.harness import Tiny


def measured(precision: str, one: float, eight: float, change: float) -> Measured:
    return Measured(precision, {1: one, 8: eight}, one * eight, 3.0, change)  # type: ignore[arg-type]


def text_ids(tiny: Tiny) -> list[int]:
    return tiny.load().tokenizer.encode(probe.TEXT, add_special_tokens=True)


def test_the_fastest_that_passes_the_gate_wins() -> None:
    plain, half = measured("plain", 30, 60, 0), measured("fp16w", 10, 16, 1e-5)
    assert fastest([plain, half, measured("int8w", 5, 15, 0.006)]) == "fp16w"
    assert fastest([plain, half, measured("int8w", 8, 14, 0.003)]) == "int8w"
    # A tenth more speed is the price of exactness.
    assert fastest([plain, half, measured("int8w", 9.5, 16, 0.003)]) == "fp16w"
    assert fastest([plain, measured("fp16w", 40, 70, 0), measured("int8w", 8, 18, -0.02)]) == "plain"


def test_plain_weights_are_left_when_nothing_passes() -> None:
    assert fastest([]) == "plain"
    assert fastest([measured("plain", 30, 60, math.nan), measured("fp16w", 10, 16, math.nan)]) == "plain"


def test_what_is_measured(tiny: Tiny) -> None:
    results = measure(tiny.load().model, text_ids(tiny), ["fp16w", "int8w"])
    assert [each.precision for each in results] == ["plain", "fp16w", "int8w"]
    assert results[0].loss_change == 0
    # A random model: about ln(vocabulary), whatever the weights are held in.
    assert all(5 < each.loss < 8 and abs(each.loss_change) < 0.01 for each in results)
    assert all(milliseconds > 0 for each in results for milliseconds in each.step_ms.values())


@pytest.mark.parametrize("when", ["packing", "multiplying"])
def test_a_precision_whose_kernel_raises_is_left_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def broken(weight: Any, bias: Any) -> Any:
        def multiply(x: Any) -> Any:
            raise RuntimeError("no such instruction")

        if when == "packing":
            raise RuntimeError("no such instruction")
        return multiply

    monkeypatch.setitem(packed._KINDS, "bf16w", broken)
    results = measure(tiny.load().model, text_ids(tiny), ["fp16w", "bf16w", "int8w"])
    assert [each.precision for each in results] == ["plain", "fp16w", "int8w"]


def test_a_precision_that_fails_on_this_model_alone_is_left_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small product of `unusable` works, a forward pass does not, or gives no number."""
    prefill = LlamaRunner.prefill
    made = LlamaRunner.__init__

    def remember(self: Any, model: Any, *, precision: PackedPrecision, **rest: Any) -> None:
        made(self, model, precision=precision, **rest)
        self.held_in = precision

    def fail(self: Any, *args: Any, **options: Any) -> Any:
        if self.held_in == "fp16w":
            raise RuntimeError("could not create a primitive")
        logits = prefill(self, *args, **options)
        return logits * math.nan if self.held_in == "int8w" else logits

    monkeypatch.setattr(LlamaRunner, "__init__", remember)
    monkeypatch.setattr(LlamaRunner, "prefill", fail)
    assert [each.precision for each in measure(tiny.load().model, text_ids(tiny), ["fp16w", "int8w"])] == ["plain"]


def test_without_plain_weights_there_is_nothing_to_compare(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(LlamaRunner, "prefill", fail)
    assert measure(tiny.load().model, text_ids(tiny), ["fp16w", "int8w"]) == []
