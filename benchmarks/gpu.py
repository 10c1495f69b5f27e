"""Training speed on a CUDA device, on a model of TinyLlama-1.1B's shape with random weights (speed does not depend on
them), so that nothing is downloaded. `python -m benchmarks.gpu`; prints 'not run' where there is no CUDA device.

Packed micro-batches on a bf16 and an int8 base, beside the tutorial's layout: rows padded to 512, 2 x 4, in bf16.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from services.trainer.data.layout import pack_rows
from services.trainer.model.forward import Packed, Sample, pack, training_forward
from services.trainer.model.lora import lora_attached, trainable
from services.trainer.model.precision import Precision, choose_precision
from services.trainer.recipe.metrics import matmul_parameters, measure_peak_flops
from services.trainer.recipe.step import make_optimizer, take_step
from shared.bases.base_model import compute_dtype, library_versions, quantization_config
from shared.jobs.spec import PRESETS, Hyperparameters, JobSpec
from shared.training.plan import CUDA_TOKEN_BUDGET

RESULTS = Path(__file__).parent / "results" / "gpu.json"
TINYLLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 2_048,
    "intermediate_size": 5_632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2_048,
}
ROUNDS, STEPS, BATCH, LENGTH = 3, 8, 8, 512


def main() -> None:
    if not torch.cuda.is_available():
        print("benchmarks.gpu: not run, there is no CUDA device")
        return
    device = torch.device("cuda")
    rows = synthetic_rows(ROUNDS * STEPS * BATCH)
    peak = measure_peak_flops(device, compute_dtype("auto", device), size=8192)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "peak_tflops": round(peak / 1e12, 1),
        "mfu_formula": "4N FLOP per real token of the best measured matrix product",
        "versions": library_versions(),
        "peers": {},
    }
    for name, measure in PEERS.items():
        results["peers"][name] = measure(rows, device, peak)
        print(f"{name:24}{json.dumps(results['peers'][name])}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def synthetic_rows(count: int) -> list[Sample]:
    """Rows of 32 to 512 tokens, a third of each being its prompt."""
    draw = np.random.default_rng(42)
    rows = []
    for length in draw.integers(32, LENGTH + 1, count):
        ids = draw.integers(3, TINYLLAMA["vocab_size"], length).astype(np.int64)
        rows.append((ids, np.arange(length) > length // 3))
    return rows


def random_base(precision: str, device: torch.device, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        with torch.device(device):
            LlamaForCausalLM(LlamaConfig(**TINYLLAMA)).to(torch.bfloat16).save_pretrained(folder)
    quantization = quantization_config("int8", torch.bfloat16) if precision == "int8" else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": device}
    )
    model.eval().requires_grad_(False)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) if quantization else model


def ours(precision: str) -> Callable[[Sequence[Sample], torch.device, float], dict[str, Any]]:
    def measure(rows: Sequence[Sample], device: torch.device, peak: float) -> dict[str, Any]:
        def packs(batch: Sequence[Sample]) -> list[Packed]:
            lengths = np.array([len(ids) for ids, _ in batch])
            bins = pack_rows(list(range(len(batch))), lengths, CUDA_TOKEN_BUDGET)
            return [pack([batch[row] for row in rows], device) for rows in bins]

        return _measure(precision, rows, device, peak, packs)

    return measure


def padded(rows: Sequence[Sample], device: torch.device, peak: float) -> dict[str, Any]:
    """The tutorial's layout: every row padded to 512, two rows at a time."""

    def packs(batch: Sequence[Sample]) -> list[Packed]:
        filled = [
            (np.pad(ids, (0, LENGTH - len(ids))), np.pad(supervised, (0, LENGTH - len(ids))))
            for ids, supervised in batch
        ]
        return [pack(filled[start : start + 2], device) for start in range(0, len(filled), 2)]

    return _measure("bf16", rows, device, peak, packs)


def _measure(
    precision: str,
    rows: Sequence[Sample],
    device: torch.device,
    peak: float,
    packs: Callable[[Sequence[Sample]], list[Packed]],
) -> dict[str, Any]:
    hyper, lora = Hyperparameters(), PRESETS["reference"].lora
    spec = JobSpec(base="-", base_revision="-", training_file="-", training_sha256="-")
    how: Precision = choose_precision(spec, device)
    with tempfile.TemporaryDirectory() as folder:
        base = random_base(precision, device, Path(folder))
    weights = matmul_parameters(base)
    torch.cuda.reset_peak_memory_stats(device)
    rates = []
    with lora_attached(base, lora, 42) as model:
        parameters = trainable(model)
        optimizer = make_optimizer(parameters, hyper)

        def step(batch: Sequence[Sample]) -> None:
            with training_forward(model, dropout=True):
                take_step(
                    model,
                    parameters,
                    optimizer,
                    packs(batch),
                    learning_rate=hyper.learning_rate,
                    max_grad_norm=hyper.max_grad_norm,
                    precision=how,
                    check=lambda: None,
                )

        step(rows[:BATCH])
        for number in range(ROUNDS):
            part = rows[number * STEPS * BATCH : (number + 1) * STEPS * BATCH]
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            for start in range(0, len(part), BATCH):
                step(part[start : start + BATCH])
            torch.cuda.synchronize(device)
            rates.append(sum(len(ids) for ids, _ in part) / (time.perf_counter() - started))
    rate = statistics.median(rates)
    return {
        "tokens_per_second": round(rate, 1),
        "rounds": [round(r, 1) for r in rates],
        "mfu": round(4 * weights * rate / peak, 3),
        "peak_allocated_mb": round(torch.cuda.max_memory_allocated(device) / 1e6),
        "peak_reserved_mb": round(torch.cuda.max_memory_reserved(device) / 1e6),
    }


PEERS: dict[str, Callable[[Sequence[Sample], torch.device, float], dict[str, Any]]] = {
    "padded to 512, 2x4, bf16": padded,
    "Tunesmith bf16": ours("bf16"),
    "Tunesmith int8": ours("int8"),
}

if __name__ == "__main__":
    main()
