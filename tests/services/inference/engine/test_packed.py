"""Which packed weights run on a processor: asked of the processor, then tried."""

from typing import Any

import pytest
import torch

from services.inference.engine import packed
from services.inference.engine.packed import PACKED, PlainLinear, ReorderedLinear, pack, unusable
from shared.processor import Processor, this_processor

AVX2_ONLY = Processor("Some CPU", frozenset({"avx2"}))


def test_every_form_but_bf16_runs_everywhere_and_bf16_where_the_processor_says_so() -> None:
    usable = [precision for precision in PACKED if unusable(precision) is None]
    expected = ["plain", "fp16w", "bf16w", "int8w"] if this_processor().converts_bf16 else ["plain", "fp16w", "int8w"]
    assert usable == expected


def test_a_processor_without_bf16_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "this_processor", lambda: AVX2_ONLY)
    assert [precision for precision in PACKED if unusable(precision)] == ["bf16w"]
    reason = unusable("bf16w")
    assert reason is not None
    assert "AVX-512" in reason
    assert "Some CPU: AVX2 only" in reason


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda x: 1 / 0, "division by zero"),
        (lambda x: torch.zeros(2, 16), "its product is wrong"),
        (lambda x: torch.full((2, 16), torch.nan), "its product is wrong"),
    ],
)
def test_a_kernel_that_does_not_multiply_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, reason: str
) -> None:
    monkeypatch.setitem(packed._KINDS, "fp16w", lambda weight, bias: kernel)
    assert unusable("fp16w") == reason


def test_plain_weights_do_without_onednn_where_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(8, 4)
    x = torch.randn(3, 8)

    def broken(weight: Any, bias: Any) -> Any:
        raise RuntimeError("no kernel")

    with torch.no_grad():
        expected = layer(x)
        assert isinstance(pack([layer], "plain"), ReorderedLinear)
        packed._reorders_fp32.cache_clear()
        monkeypatch.setattr(packed, "_reordered_fp32", broken)
        try:
            plain = pack([layer], "plain")
        finally:
            packed._reorders_fp32.cache_clear()
        assert isinstance(plain, PlainLinear)
        torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize("count", [1, 3])
def test_weights_that_stay_as_they_are_are_there_once(count: int) -> None:
    """As on a GPU; in bf16, which oneDNN's layout is not for."""
    layers = [torch.nn.Linear(8, 4 + number, dtype=torch.bfloat16) for number in range(count)]
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], 1)
        plain = pack(layers, "plain")
        assert isinstance(plain, PlainLinear)
        torch.testing.assert_close(plain(x), expected)
        torch.testing.assert_close(torch.cat([layer(x) for layer in layers], 1), expected)
    storage = plain._weight.untyped_storage()
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {storage.data_ptr()}
    assert storage.nbytes() == sum(layer.weight.nbytes for layer in layers)
