"""Training and serving speed on a CUDA device, on a model of TinyLlama-1.1B's shape with random weights (speed does not
depend on them), so that nothing is downloaded. `python -m benchmarks.gpu`; prints 'not run' where there is no CUDA
device.

Training: packed micro-batches on a bf16, int8 and nf4 base, beside the same through transformers' and bitsandbytes' own
forward, the tutorial's layout (rows padded to 512, 2 x 4, in bf16), and TRL and Unsloth where they are installed.
Serving: decode steps of 16 and 64 rows and prefill, without HTTP.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_peers
from benchmarks.llama_shapes import TINYLLAMA_1B
from services.inference.engine.llama import LlamaRunner
from services.inference.engine.lora import LoraWeights
from services.trainer.data.layout import pack_rows
from services.trainer.model.bases import make_trainable
from services.trainer.model.forward import Packed, Sample, pack, training_forward
from services.trainer.model.lora import lora_attached, trainable
from services.trainer.model.precision import Precision, choose_precision
from services.trainer.recipe.metrics import matmul_parameters, measure_peak_flops
from services.trainer.recipe.step import make_optimizer, take_step
from shared.bases.base_model import (
    compute_dtype,
    library_versions,
    prepare_device,
    quantization_config,
    quiet_libraries,
)
from shared.jobs.spec import PRESETS, BasePrecision, Hyperparameters, JobSpec
from shared.training.plan import CUDA_TOKEN_BUDGET

RESULTS = Path(__file__).parent / "results" / "gpu.json"
TINYLLAMA = TINYLLAMA_1B | {"max_position_embeddings": 2_048}
ROUNDS, STEPS, BATCH, LENGTH = 3, 8, 8, 512
# A packed row of 512 tokens holds about two of the rows.
PEER_ROWS = 3 * gpu_peers.BATCH * (gpu_peers.WARM_UP + gpu_peers.ROUNDS * gpu_peers.STEPS)
ROWS, CONTEXT, RANK, ADAPTERS = (16, 64), 1_024, 8, 4


def main() -> None:
    if not torch.cuda.is_available():
        print("benchmarks.gpu: not run, there is no CUDA device")
        return
    quiet_libraries()
    device = torch.device("cuda")
    peak = measure_peak_flops(device, compute_dtype("auto", device))
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "peak_tflops": round(peak / 1e12, 1),
        "mfu_formula": "4N FLOP per real token of the best measured matrix product",
        "versions": library_versions() | {"cuda": str(torch.version.cuda)},
        "training": {},
        "serving": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = write_base(Path(name), device)
        for seed, (peer, measure) in enumerate(TRAINING.items()):
            # Rows of its own for each: kernels that are prepared for every new length would be there already.
            rows = synthetic_rows(ROUNDS * STEPS * BATCH, seed)
            results["training"][peer] = measure(rows, device, peak, folder)
            print(f"{peer:28}{json.dumps(results['training'][peer])}", flush=True)
        for seed, peer in enumerate(("trl", "unsloth"), start=len(TRAINING)):
            torch.cuda.empty_cache()
            found = gpu_peers.measure(peer, synthetic_rows(PEER_ROWS, seed), device, folder, LENGTH)
            results["training"][f"{peer}, packed, bf16"] = found
            print(f"{peer + ', packed, bf16':28}{json.dumps(found)}", flush=True)
        for precision in ("bf16", "fp32"):
            results["serving"][precision] = serve(device, folder, precision)
            print(f"{'serving ' + precision:28}{json.dumps(results['serving'][precision])}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def synthetic_rows(count: int, seed: int) -> list[Sample]:
    """Rows of 32 to 512 tokens, a third of each being its prompt."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in draw.integers(32, LENGTH + 1, count):
        ids = draw.integers(3, TINYLLAMA["vocab_size"], length).astype(np.int64)
        rows.append((ids, np.arange(length) > length // 3))
    return rows


def write_base(folder: Path, device: torch.device) -> Path:
    torch.manual_seed(0)
    with torch.device(device):
        LlamaForCausalLM(LlamaConfig(**TINYLLAMA)).to(torch.bfloat16).save_pretrained(folder)
    torch.cuda.empty_cache()
    return folder


@contextmanager
def torchs_choice_of_attention() -> Iterator[None]:
    """cuDNN's included, which Tunesmith does without."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(False)


def load(precision: BasePrecision, device: torch.device, folder: Path) -> Any:
    torch.cuda.empty_cache()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        quantization_config=quantization_config(precision, torch.bfloat16),
        device_map={"": device},
    )
    return model.eval().requires_grad_(False)


Measure = Callable[[Sequence[Sample], torch.device, float, Path], dict[str, Any]]


def ours(precision: BasePrecision) -> Measure:
    """Packed micro-batches through what the trainer makes of a base."""

    def measure(rows: Sequence[Sample], device: torch.device, peak: float, folder: Path) -> dict[str, Any]:
        base = load(precision, device, folder)
        prepare_device(device)
        make_trainable(base, quantized=precision in ("int8", "nf4"), dtype=torch.bfloat16)
        return train(base, rows, device, peak, partial(packed, device))

    return measure


def plain(precision: BasePrecision) -> Measure:
    """Packed micro-batches through transformers' forward, its block mask and bitsandbytes' products."""

    def measure(rows: Sequence[Sample], device: torch.device, peak: float, folder: Path) -> dict[str, Any]:
        base = load(precision, device, folder)
        if precision in ("int8", "nf4"):
            prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        with torchs_choice_of_attention():
            return train(base, rows, device, peak, partial(packed, device))

    return measure


def packed(device: torch.device, batch: Sequence[Sample]) -> list[Packed]:
    lengths = np.array([len(ids) for ids, _ in batch])
    bins = pack_rows(list(range(len(batch))), lengths, CUDA_TOKEN_BUDGET)
    return [pack([batch[row] for row in rows], device) for rows in bins]


def padded(rows: Sequence[Sample], device: torch.device, peak: float, folder: Path) -> dict[str, Any]:
    """The tutorial's layout: every row padded to 512, two rows at a time."""

    def packs(batch: Sequence[Sample]) -> list[Packed]:
        filled = [
            (np.pad(ids, (0, LENGTH - len(ids))), np.pad(supervised, (0, LENGTH - len(ids))))
            for ids, supervised in batch
        ]
        return [pack(filled[start : start + 2], device) for start in range(0, len(filled), 2)]

    with torchs_choice_of_attention():
        return train(load("bf16", device, folder), rows, device, peak, packs)


def train(
    base: Any,
    rows: Sequence[Sample],
    device: torch.device,
    peak: float,
    packs: Callable[[Sequence[Sample]], list[Packed]],
) -> dict[str, Any]:
    """Real tokens per second of whole optimizer steps, and the memory they took."""
    hyper, lora = Hyperparameters(), PRESETS["reference"].lora
    spec = JobSpec(base="-", base_revision="-", training_file="-", training_sha256="-")
    how: Precision = choose_precision(spec, device)
    weights = matmul_parameters(base)
    torch.cuda.reset_peak_memory_stats(device)
    rates, losses = [], []
    with lora_attached(base, lora, 42) as model:
        parameters = trainable(model)
        optimizer = make_optimizer(parameters, hyper)

        def step(batch: Sequence[Sample]) -> None:
            with training_forward(model, dropout=True):
                result = take_step(
                    model,
                    parameters,
                    optimizer,
                    packs(batch),
                    learning_rate=hyper.learning_rate,
                    max_grad_norm=hyper.max_grad_norm,
                    precision=how,
                    check=lambda: None,
                )
            losses.append(result.loss)

        for start in range(0, 2 * BATCH, BATCH):
            step(rows[start : start + BATCH])
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
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "peak_allocated_mb": round(torch.cuda.max_memory_allocated(device) / 1e6),
        "peak_reserved_mb": round(torch.cuda.max_memory_reserved(device) / 1e6),
    }


def serve(device: torch.device, folder: Path, precision: BasePrecision) -> dict[str, Any]:
    """Milliseconds of a decode step, its rows at 200 to 400 tokens and one more each step; prefill in tokens/s."""
    prepare_device(device)
    runner = LlamaRunner(
        load(precision, device, folder), precision="plain", rows=max(ROWS), context=CONTEXT, adapter_slots=ADAPTERS
    )
    draw = torch.Generator().manual_seed(1)
    for slot in range(1, ADAPTERS + 1):
        pairs = {
            path: (
                torch.randn(RANK, fan_in, generator=draw).to(runner.dtype) * 0.01,
                torch.randn(fan_out, RANK, generator=draw).to(runner.dtype) * 0.01,
            )
            for path, (fan_in, fan_out) in runner.lora.modules.items()
            if path.endswith(("q_proj", "v_proj"))
        }
        runner.lora.write(slot, runner.lora.prepare(LoraWeights(RANK, pairs)))
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for rows in ROWS:
            kinds = {
                "base": [0] * rows,
                "one adapter": [1] * rows,
                "four adapters": [i % ADAPTERS + 1 for i in range(rows)],
            }
            for name, slots in kinds.items():
                each = milliseconds(decoding(runner, slots), 50)
                found[f"decode, {rows} rows, {name}, ms"] = round(each, 3)
                found[f"decode, {rows} rows, {name}, tokens/s"] = round(rows / each * 1e3)
        for chunk in (128, 1024):
            each = milliseconds(partial(runner.prefill, 0, [5] * chunk, 0, 0, all_logits=False), 20)
            found[f"prefill in {chunk}, tokens/s"] = round(chunk / each * 1e3)
    return found


def decoding(runner: LlamaRunner, slots: list[int]) -> Callable[[], torch.Tensor]:
    """A decode step of one row for each slot, which is at the next position each time it is called."""
    rows = len(slots)
    positions = [200 + 200 * row // rows for row in range(rows)]

    def step() -> torch.Tensor:
        logits = runner.decode(0, list(range(3, 3 + rows)), positions, slots)
        positions[:] = [position + 1 for position in positions]
        return logits

    return step


def milliseconds(call: Callable[[], torch.Tensor], times: int) -> float:
    """Median of `times` calls, each ending with its result on the host, after three that warm up."""
    taken = []
    for _ in range(times + 3):
        started = time.perf_counter()
        call().argmax(-1).tolist()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken[3:])


TRAINING: dict[str, Measure] = {
    "padded to 512, 2x4, bf16": padded,
    "transformers, packed, bf16": plain("bf16"),
    "transformers, packed, int8": plain("int8"),
    "transformers, packed, nf4": plain("nf4"),
    "Tunesmith bf16": ours("bf16"),
    "Tunesmith int8": ours("int8"),
    "Tunesmith nf4": ours("nf4"),
}

if __name__ == "__main__":
    main()
