import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.trainer.recipe.metrics import (
    History,
    matmul_parameters,
    measure_peak_flops,
    peak_memory_mb,
    reset_peak_memory,
    utilisation,
)
from services.trainer.recipe.step import StepResult
from tests.services.trainer.harness import CPU


def test_history_counts_and_survives_json() -> None:
    history = History()
    history.add(StepResult(loss=3.0, grad_norm=2.0, tokens=30, supervised_tokens=10), 0.5)
    history.add(StepResult(loss=1.0, grad_norm=float("inf"), tokens=10, supervised_tokens=5), 0.5)
    history.valid_losses.append((0, 4.0))
    assert (history.step, history.trained_tokens, history.total_tokens) == (2, 15, 40)
    assert (history.mean_loss, history.window_loss) == (2.0, 2.0)
    assert (history.tokens_per_second, history.window_rate) == (40.0, 40.0)
    assert (history.grad_norm, history.skipped_in_a_row) == (2.0, 1)
    assert (history.valid_loss(0), history.valid_loss(2)) == (4.0, None)
    assert History.from_json(json.loads(json.dumps(history.as_json()))) == history


def test_the_window_is_what_came_since_the_last_event() -> None:
    history = History()
    history.add(StepResult(3.0, 1.0, 30, 10), 1.0)
    history.window.clear()
    history.add(StepResult(1.0, 1.0, 10, 10), 1.0)
    assert (history.window_loss, history.window_rate, history.tokens_per_second) == (1.0, 10.0, 20.0)


def test_matmul_weights_of_tinyllama_are_the_linears_and_the_head() -> None:
    """968.9 M + 65.5 M; the embedding table takes part in no product."""
    shape = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=4))
    weights = matmul_parameters(model)
    assert weights == 968_884_224 + 32000 * 2048
    assert utilisation(100, weights, 4e12) == pytest.approx(4 * weights * 100 / 4e12)
    assert utilisation(100, weights, None) is None


def can_reset_the_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_reset_the_peak(), reason="this system does not let a process reset its peak")
def test_the_peak_of_memory_is_seen_and_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_mb(CPU)
    block = torch.ones(50_000_000)
    peak = peak_memory_mb(CPU)
    assert peak > before + 150
    # Freed memory is still part of the peak, until it is reset.
    del block
    assert peak_memory_mb(CPU) > before + 150
    reset_peak_memory(CPU)
    assert peak_memory_mb(CPU) < peak - 150


def test_peak_flops_are_those_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(float(n * n) for n in range(40, 0, -1))
    monkeypatch.setattr("services.trainer.recipe.metrics.time.perf_counter", lambda: -next(seconds))
    # The clock runs at -n * n, so that the last product takes the least: 4 - 1 seconds.
    assert measure_peak_flops(CPU, size=8) == 2 * 8**3 / 3
