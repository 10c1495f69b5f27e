"""The choice of a precision: measured on this machine, and only among those that keep the loss."""

from pathlib import Path

from services.inference.engine import probe
from services.inference.engine.probe import Measured, fastest, measure
from tests.services.inference.harness import Tiny


def measured(precision: str, one: float, eight: float, change: float) -> Measured:
    return Measured(precision, {1: one, 8: eight}, one * eight, 3.0, change)  # type: ignore[arg-type]


def test_the_fastest_that_passes_the_gate_wins() -> None:
    plain, half = measured("plain", 30, 60, 0), measured("fp16w", 10, 16, 1e-5)
    assert fastest([plain, half, measured("int8w", 5, 15, 0.006)]) == "fp16w"
    assert fastest([plain, half, measured("int8w", 8, 14, 0.003)]) == "int8w"
    # A tenth more speed is the price of exactness.
    assert fastest([plain, half, measured("int8w", 9.5, 16, 0.003)]) == "fp16w"
    assert fastest([plain, measured("fp16w", 40, 70, 0), measured("int8w", 8, 18, -0.02)]) == "plain"


def test_what_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    loaded = tiny.load()
    results = measure(loaded.model, loaded.tokenizer.encode(probe.TEXT, add_special_tokens=True), ["fp16w", "int8w"])
    assert [each.precision for each in results] == ["plain", "fp16w", "int8w"]
    assert results[0].loss_change == 0
    # A random model: about ln(vocabulary), whatever the weights are held in.
    assert all(5 < each.loss < 8 and abs(each.loss_change) < 0.01 for each in results)
    assert all(milliseconds > 0 for each in results for milliseconds in each.step_ms.values())
