"""What must hold on a CUDA device (`make test-gpu`); skipped, and said to be, where there is none."""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from services.trainer.model import lora_kernels
from services.trainer.model.bases import WarmBases
from services.trainer.model.dequantised import DequantisedLinear
from services.trainer.model.fingerprint import BlockMixer, fingerprint, frozen_tensors
from services.trainer.model.forward import Packed, pack, pack_on_host, supervised_logits, training_forward
from services.trainer.model.llama import fused_form
from services.trainer.model.llama_kernels import attend_per_sample
from services.trainer.model.lora import lora_attached, trainable
from services.trainer.model.precision import Precision, choose_precision
from services.trainer.recipe.free_memory import free_bytes
from services.trainer.recipe.metrics import measure_peak_flops
from services.trainer.recipe.step import accumulate_gradients, make_optimizer, take_step
from shared import installation
from shared.bases.catalogue import Catalogue
from shared.bases.device import take_share
from shared.errors import JobFailed
from shared.jobs.spec import BasePrecision, ComputeDtype, Hyperparameters, LoraSpec
from shared.settings import Settings
from tests.services.trainer.harness import RecordingSession, TinyJob, ignore, instruction_rows, weights_of
from tests.services.trainer.model.test_forward import LENGTHS, ragged, random_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # The tiny model is narrower than bitsandbytes' fast 4-bit kernel wants it.
    pytest.mark.filterwarnings("ignore:inner dimension:UserWarning"),
]
CUDA = torch.device("cuda")
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def on_cuda(tiny: TinyJob) -> WarmBases:
    return WarmBases(Catalogue((tiny.base,)), tiny.store, CUDA)


@pytest.mark.parametrize("compute", ["auto", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp16", "fp32"])
def test_every_precision_trains_and_its_adapter_is_checked(
    tiny: TinyJob, precision: BasePrecision, compute: ComputeDtype
) -> None:
    spec = tiny.spec(
        base_precision=precision, compute_dtype=compute, validation=instruction_rows(5, start=40), hyper={"n_epochs": 6}
    )
    report = tiny.finish(spec, bases=on_cuda(tiny)).report
    assert report.eval_loss_before is not None
    assert report.eval_loss_after is not None
    assert report.eval_loss_after < report.eval_loss_before
    assert report.device == "cuda"
    assert report.peak_memory_mb > 0


@pytest.mark.parametrize(("compute", "scaled"), [("bf16", False), ("fp16", True), ("fp32", False)])
def test_products_run_in_the_dtype_asked_for(tiny: TinyJob, compute: ComputeDtype, scaled: bool) -> None:
    precision = choose_precision(tiny.spec(compute_dtype=compute), CUDA)
    x = torch.ones(16, 16, device=CUDA)
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[compute]
    with precision.autocast():
        assert (x @ x).dtype == precision.dtype == expected
    assert (precision.scaler is not None) == scaled


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp32"])
def test_fp16_scales_skips_an_overflow_and_trains_on(tiny: TinyJob, precision: BasePrecision) -> None:
    spec = tiny.spec(base_precision=precision, compute_dtype="fp16")
    half = choose_precision(spec, CUDA)
    assert half.scaler is not None
    base, _ = on_cuda(tiny).load(spec, half.dtype)
    packs = [pack(ragged([9, 4]), CUDA)]
    with lora_attached(base.loaded.model, spec.lora, 1) as model:
        optimizer = make_optimizer(trainable(model), Hyperparameters())

        def step() -> Any:
            with training_forward(model, dropout=True):
                return take_step(
                    model,
                    trainable(model),
                    optimizer,
                    packs,
                    learning_rate=0.1,
                    max_grad_norm=1.0,
                    precision=half,
                    check=ignore,
                )

        half.scaler.scale(torch.zeros((), device=CUDA))
        half.scaler.update(2.0**126)
        assert step().skipped
        assert half.scaler.get_scale() == 2.0**125
        assert not any(p.any() for name, p in trainable(model).items() if "lora_B" in name)
        half.scaler.update(2.0**10)
        assert not step().skipped
        assert all(p.any() for name, p in trainable(model).items() if "lora_B" in name)


def test_a_packed_samples_logits_are_its_own_alone() -> None:
    model: Any = random_llama().to(CUDA)
    assert fused_form(model) is None
    samples = ragged(LENGTHS)
    with torch.no_grad():
        together = supervised_logits(model, pack(samples, CUDA))
        alone = torch.cat([supervised_logits(model, pack([sample], CUDA)) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_bf16_runs_through_the_fused_pieces_and_other_dtypes_through_transformers(tiny: TinyJob) -> None:
    bases = on_cuda(tiny)
    for precision in get_args(BasePrecision):
        for compute in ("bf16", "fp16", "fp32"):
            spec = tiny.spec(base_precision=precision, compute_dtype=compute)
            how = choose_precision(spec, CUDA)
            base, _ = bases.load(spec, how.dtype)
            with how.autocast():
                assert (fused_form(base.loaded.model) is not None) == (compute == "bf16"), (precision, compute)


@pytest.mark.parametrize(("queries", "keys", "width"), [(4, 2, 8), (8, 1, 64), (6, 6, 128)])
def test_packed_attention_is_each_samples_own_in_both_directions(queries: int, keys: int, width: int) -> None:
    draw = torch.Generator().manual_seed(2)
    tokens = sum(LENGTHS)
    rotated, values, direction = (
        torch.randn(tokens, heads, width, generator=draw).bfloat16().float()
        for heads in (queries + keys, keys, queries)
    )
    found = []
    for device in (torch.device("cpu"), CUDA):
        inputs = tuple(t.to(device).detach().requires_grad_() for t in (rotated, values))
        attended = attend_per_sample(inputs[0], inputs[1], LENGTHS, queries)
        grads = torch.autograd.grad(attended, inputs, direction.to(device))
        found.append([t.detach().cpu() for t in (attended, *grads)])
    for expected, actual in zip(*found, strict=True):
        assert actual.dtype == torch.float32
        assert float((actual - expected).norm() / expected.norm()) < 1e-2


def test_dropout_of_the_fused_pieces_is_drawn_on_the_device(tiny: TinyJob) -> None:
    x = torch.ones(1000, 1000, device=CUDA)
    states = []
    for _ in range(2):
        torch.cuda.manual_seed(3)
        kept = lora_kernels._dropout_mask(x, 0.25)
        assert kept is not None
        states.append(kept)
    assert torch.equal(*states)
    assert float(states[0].float().mean()) == pytest.approx(0.75, abs=0.01)


def test_a_packed_samples_fused_logits_are_its_own_alone(tiny: TinyJob) -> None:
    spec = tiny.spec(base_precision="int8", compute_dtype="bf16")
    how = choose_precision(spec, CUDA)
    model = on_cuda(tiny).load(spec, how.dtype)[0].loaded.model
    samples = ragged(LENGTHS)
    with torch.no_grad(), how.autocast():
        together = supervised_logits(model, pack(samples, CUDA))
        alone = torch.cat([supervised_logits(model, pack([sample], CUDA)) for sample in samples])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-2)


def gradients(bases: WarmBases, spec: Any, packs: list[Packed]) -> tuple[float, dict[str, Tensor]]:
    """Loss and every LoRA gradient on a base with B moved off zero, on the CPU in fp32."""
    precision = choose_precision(spec, bases.device)
    base, _ = bases.load(spec, precision.dtype)
    with lora_attached(base.loaded.model, spec.lora, 7) as model:
        draw = torch.Generator().manual_seed(5)
        for name, parameter in trainable(model).items():
            # The initial A comes from the device's own generator.
            values = torch.randn(parameter.shape, generator=draw) * (0.05 if ".lora_B." in name else 0.3)
            parameter.data.copy_(values)
        with training_forward(model, dropout=True):
            loss = float(accumulate_gradients(model, packs, unscaled(precision), ignore).sum())
        return loss, {name: p.grad.float().cpu() for name, p in trainable(model).items() if p.grad is not None}


def unscaled(precision: Precision) -> Precision:
    return Precision(precision.device, precision.dtype, precision.autocast, None)


@pytest.mark.parametrize(
    ("precision", "compute", "bound"),
    [
        ("fp32", "fp32", 1e-4),
        ("int8", "fp32", 1e-3),
        ("fp32", "bf16", 0.1),
        ("bf16", "bf16", 0.1),
        ("int8", "bf16", 0.1),
        ("nf4", "bf16", 0.15),
        ("fp32", "fp16", 0.02),
        ("int8", "fp16", 0.02),
    ],
)
def test_the_loss_and_every_gradient_are_the_cpus(
    tiny: TinyJob, precision: BasePrecision, compute: ComputeDtype, bound: float
) -> None:
    """The CPU computes in fp32 from the same stored weights; a bound is what rounding to the compute dtype may do."""
    lora = LoraSpec(dropout=0, target_modules=EVERY_LINEAR)
    samples = ragged([17, 5, 40, 23])
    exact = tiny.spec(base_precision=precision, compute_dtype="fp32", lora=lora)
    loss, expected = gradients(tiny.bases, exact, [pack(samples, torch.device("cpu"))])
    spec = tiny.spec(base_precision=precision, compute_dtype=compute, lora=lora)
    on_gpu, actual = gradients(on_cuda(tiny), spec, [pack(samples, CUDA)])
    assert on_gpu == pytest.approx(loss, rel=bound / 10)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).norm() / gradient.norm()) <= bound, name


def test_a_pack_from_pinned_memory_is_the_pack() -> None:
    samples = ragged(LENGTHS)
    on_host = pack_on_host(samples, pinned=True)
    assert on_host.numbers.is_pinned()
    moved, plain = on_host.to(CUDA), pack(samples, CUDA)
    assert moved.lengths == plain.lengths
    for name in ("ids", "positions", "predictors", "labels"):
        assert torch.equal(getattr(moved, name), getattr(plain, name)), name


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp32"])
def test_the_fingerprint_of_a_base_is_mixed_where_it_lies(tiny: TinyJob, precision: BasePrecision) -> None:
    """Whole numbers are the same on every device; one bit of a weight or of what lies beside it counts."""
    model = on_cuda(tiny).load(tiny.spec(base_precision=precision), torch.bfloat16)[0].loaded.model
    before = fingerprint(model)
    for name, tensor in frozen_tensors(model):
        words = BlockMixer(tensor.device, 64).words(tensor)
        assert torch.equal(words.cpu(), BlockMixer(torch.device("cpu"), 64).words(tensor.cpu())), name
        memory = tensor.view(-1).view(torch.uint8)
        memory[-1] ^= 1
        assert fingerprint(model) != before, name
        memory[-1] ^= 1
    assert fingerprint(model) == before


def test_int8_layers_multiply_their_dequantised_weights(tiny: TinyJob) -> None:
    spec = tiny.spec(base_precision="int8", compute_dtype="bf16")
    base, _ = on_cuda(tiny).load(spec, torch.bfloat16)
    layer = base.loaded.model.model.layers[0].self_attn.q_proj
    assert type(layer) is DequantisedLinear
    assert layer.weight.device.type == "cuda"
    assert layer.weight.dtype == torch.int8
    # A spike in one row would make bitsandbytes treat a column of all rows apart.
    quiet = torch.randn(2, 32, device=CUDA)
    spiky = torch.cat([quiet, torch.full((1, 32), 40.0, device=CUDA)])
    torch.testing.assert_close(layer(quiet), layer(spiky)[:2])


def test_a_stopped_job_goes_on_from_its_checkpoint(tiny: TinyJob) -> None:
    """Bytes are promised on CPUs only: atomics in CUDA's backward passes may differ in the last bit."""
    spec, bases = tiny.spec(base_precision="fp32"), on_cuda(tiny)
    whole = tiny.finish(spec, job="ftjob-whole", bases=bases)
    first = RecordingSession(stop=lambda steps: steps == 4)
    tiny.run(spec, first, bases=bases)
    found = [tiny.store.checkpoint("ftjob-one", 1, commit.step) for commit in reversed(first.commits)]
    resumed = tiny.finish(spec, token=2, candidates=found, bases=bases)
    assert resumed.report.steps == whole.report.steps
    assert resumed.report.train_loss == pytest.approx(whole.report.train_loss, rel=1e-3)
    assert weights_of(resumed)


@pytest.mark.parametrize("begun_on", ["cpu", "cuda"])
def test_a_job_goes_on_where_it_was_not_begun(tiny: TinyJob, begun_on: str) -> None:
    """On another kind of device the last bits differ, and no more."""
    spec = tiny.spec(base_precision="fp32", compute_dtype="fp32")
    places = {"cpu": tiny.fresh_bases(), "cuda": on_cuda(tiny)}
    whole = tiny.finish(spec, job="ftjob-whole", bases=places[begun_on])
    first = RecordingSession(stop=lambda steps: steps == 4)
    tiny.run(spec, first, bases=places.pop(begun_on))
    found = [tiny.store.checkpoint("ftjob-one", 1, commit.step) for commit in reversed(first.commits)]
    (elsewhere,) = places.values()
    resumed = tiny.finish(spec, token=2, candidates=found, bases=elsewhere)
    assert resumed.report.steps == whole.report.steps
    assert resumed.report.train_loss == pytest.approx(whole.report.train_loss, rel=1e-3)


def test_a_stopped_fp16_job_goes_on_with_its_loss_scale(tiny: TinyJob) -> None:
    spec, bases = tiny.spec(base_precision="fp32", compute_dtype="fp16"), on_cuda(tiny)
    first = RecordingSession(stop=lambda steps: steps == 4)
    tiny.run(spec, first, bases=bases)
    found = [tiny.store.checkpoint("ftjob-one", 1, commit.step) for commit in reversed(first.commits)]
    assert found
    assert tiny.finish(spec, token=2, candidates=found, bases=bases).report.steps == 6


def test_running_out_of_memory_fails_the_job_and_not_the_worker(tiny: TinyJob) -> None:
    bases = on_cuda(tiny)
    spec = tiny.spec(base_precision="fp32", compute_dtype="fp32")
    tiny.finish(spec, job="ftjob-before", bases=bases)
    hog = RecordingSession(stop=lambda steps: bool(torch.empty(1 << 50, dtype=torch.uint8, device=CUDA).numel()))
    with pytest.raises(JobFailed) as failure:
        tiny.run(spec, hog, bases=bases)
    assert failure.value.code == "out_of_memory"
    assert tiny.finish(spec, job="ftjob-after", bases=bases).report.steps == 6


def test_a_step_without_memory_is_done_again_in_smaller_micro_batches(tiny: TinyJob) -> None:
    """The allocator is told of a card that is smaller than the job's first micro-batches need."""
    rows = [{"instruction": "What?", "output": "and ".join(f"{i * n}" for i in range(60))} for n in range(64)]
    spec = tiny.spec(rows, base_precision="bf16", compute_dtype="bf16", hyper={"batch_size": 64, "max_length": 512})
    bases, session = on_cuda(tiny), RecordingSession()
    whole = tiny.finish(spec, job="ftjob-whole", bases=bases).report
    bases.release_memory()
    base = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    tiny.finish(spec, job="ftjob-again", bases=bases)
    peak = torch.cuda.max_memory_reserved()
    bases.release_memory()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((base + 0.7 * (peak - base)) / total)
    try:
        report = tiny.finish(spec, session, bases=bases).report
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert report.steps == whole.steps
    assert report.train_loss == pytest.approx(whole.train_loss, rel=0.02)
    assert any("from now on they have at most" in message for _, message, _ in session.events)


def test_a_job_leaves_no_memory_behind_but_the_warm_base(tiny: TinyJob) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    spec, bases = tiny.spec(base_precision="bf16", compute_dtype="bf16"), on_cuda(tiny)
    sizes = []
    for number in range(3):
        tiny.finish(spec, job=f"ftjob-{number}", bases=bases)
        sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    allocated = [size for size, _ in sizes]
    assert max(allocated[1:]) <= allocated[0] + 1_000_000, sizes
    assert sizes[-1][1] <= allocated[-1] + 64_000_000, sizes


def test_a_share_of_the_card_is_what_a_process_gets() -> None:
    _, total = torch.cuda.mem_get_info()
    try:
        take_share(torch.device("cuda"), 0.05)
        assert free_bytes(torch.device("cuda")) <= total * 0.05
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(total * 0.06), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_measured_peak_is_what_the_card_can_do() -> None:
    """Half of the best product there is would make MFU twice what it is."""
    a, b = (torch.randn(8192, 8192, device=CUDA).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    best = 10 * 2 * 8192**3 / (start.elapsed_time(end) / 1e3)
    assert measure_peak_flops(CUDA, torch.bfloat16) == pytest.approx(best, rel=0.15)


def test_the_installation_check_asks_the_device() -> None:
    assert torch.cuda.get_device_name() in installation.torch(Settings())


def test_a_lost_device_gives_the_job_back_and_ends_the_worker(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "tests.services.trainer.lose_device", str(tmp_path)]
    done = subprocess.run(call, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False, timeout=80)
    assert done.returncode == 0, done.stderr[-3000:]
