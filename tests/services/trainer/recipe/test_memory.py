"""Memory before it is missing: what is counted against what is really taken, and that what is said to fit does fit."""

from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from services.trainer.contract import JobRun
from services.trainer.data.layout import Layout, largest_micro_batch_tokens
from services.trainer.model.bases import WarmBases
from services.trainer.model.forward import Packed, loss_sum, pack, training_forward
from services.trainer.model.lora import lora_attached, trainable
from services.trainer.model.precision import choose_precision
from services.trainer.recipe import finetune as recipe
from services.trainer.recipe import free_memory, memory
from services.trainer.recipe.evaluate import evaluation_loss
from services.trainer.recipe.finetune import finetune
from services.trainer.recipe.free_memory import cgroup_bytes, free_bytes
from services.trainer.recipe.memory import Fit, Need, fitting_budget, largest_fit, shortage
from services.trainer.recipe.memory_measurement import measure_need, saved_activation_bytes
from services.trainer.recipe.metrics import peak_memory_mb, reset_peak_memory
from services.trainer.recipe.step import StepResult, make_optimizer, take_step
from shared.bases.base_model import prepare_base
from shared.bases.catalogue import Catalogue
from shared.errors import JobFailed
from shared.jobs.spec import BasePrecision, ComputeDtype, Hyperparameters, JobSpec, LoraSpec
from shared.storage.artifacts import LocalArtifactStore
from shared.training.plan import TrainingPlan
from tests.rounding import llama_sums, rounding
from tests.services.trainer.harness import CPU, RecordingSession, TinyJob, ignore, instruction_rows
from tests.tiny import tiny_catalogue, write_tiny_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Lengths = st.lists(st.integers(2, 5000), min_size=1, max_size=60)


@given(Lengths, st.integers(1, 20), st.integers(16, 6000), st.integers(0, 5))
def test_no_micro_batch_is_larger_than_the_bound(lengths: list[int], batch: int, budget: int, seed: int) -> None:
    array = np.asarray(lengths, np.int64)
    layout = Layout(array, TrainingPlan(len(lengths), batch, 3), seed, budget)
    bound = largest_micro_batch_tokens(array, batch, budget)
    for step in range(layout.total_steps):
        for rows in layout.micro_batches(step):
            assert sum(lengths[row] for row in rows) <= bound


@given(
    Lengths,
    st.integers(1, 64),
    st.integers(16, 20_000),
    st.integers(1, 10**10),
    st.floats(0, 1e9),
    st.floats(1, 1e7),
)
def test_what_is_said_to_fit_fits(
    lengths: list[int], batch: int, budget: int, free: int, fixed: float, per_token: float
) -> None:
    need, rows = Need(fixed, per_token), np.asarray(lengths, np.int64)
    hyper = Hyperparameters(max_length=max(8, *lengths), batch_size=batch)
    found = shortage(need, free, rows, hyper, budget)
    if found is None:
        assert need.of(largest_micro_batch_tokens(rows, batch, budget)) <= free
        return
    assert found.needed > free
    if found.fit is None:
        # Not even the shortest rows that a job may have, one at a time.
        assert need.of(memory.MIN_LENGTH) > free
        assert found.smaller == {}
        return
    fit = found.fit
    assert found.smaller
    cut = np.minimum(rows, fit.max_length)
    taken = largest_micro_batch_tokens(cut, fit.batch_size, budget)
    assert need.of(taken) <= free
    # The very same check, with the numbers it named, has nothing more to say.
    assert shortage(need, free, cut, hyper.model_copy(update=found.smaller), budget) is None
    # And no larger batch would do.
    assert fit.batch_size == batch or need.of(largest_micro_batch_tokens(cut, fit.batch_size + 1, budget)) > free


@pytest.mark.parametrize(
    ("within", "lengths", "fit"),
    [
        # Rows too long for memory are cut; how many of them a step has does not matter: each is alone.
        (1590, [4096, 3000, 20], Fit(1536, 8)),
        # Rows that fit one by one: fewer of them at a time.
        (700, [300] * 20, Fit(4096, 2)),
        (700, [600] * 20, Fit(4096, 1)),
        # Both.
        (500, [4096] * 20, Fit(448, 1)),
        (90, [4096] * 20, Fit(90, 1)),
        (7, [4096], None),
    ],
)
def test_as_little_as_possible_is_changed(within: int, lengths: list[int], fit: Fit | None) -> None:
    assert largest_fit(within, np.asarray(lengths), Fit(4096, 8), 1024) == fit


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("base_precision", "compute_dtype"), [("fp32", "fp32"), ("int8", "fp32"), ("nf4", "fp32"), ("bf16", "bf16")]
)
def test_saved_activations_are_those_allocated_and_not_freed(
    tiny: TinyJob, base_precision: BasePrecision, compute_dtype: ComputeDtype, fused: bool
) -> None:
    """Against torch's profiler, which sees every allocation, bitsandbytes' own included."""
    spec = tiny.spec(base_precision=base_precision, compute_dtype=compute_dtype, lora=LoraSpec(target_modules=ALL))
    precision = choose_precision(spec, CPU)
    model = tiny.bases.load(spec, precision.dtype)[0].loaded.model
    if not fused:
        model.fused = None
    packed = pack([(np.arange(200) % 300 + 3, np.arange(200) > 100)], CPU)
    with lora_attached(model, spec.lora, spec.seed) as adapted, training_forward(adapted, dropout=True):
        # The first pass moves scales and fills buffers.
        counted = [saved_activation_bytes(adapted, packed, precision) for _ in range(2)][1]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, precision.autocast():
            loss = loss_sum(adapted, packed)
        allocated = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
        del loss
    assert counted == pytest.approx(allocated, rel=0.03)


def test_the_count_leaves_no_trace(tiny: TinyJob) -> None:
    spec = tiny.spec(lora=LoraSpec(dropout=0.5))
    precision = choose_precision(spec, CPU)
    model = tiny.bases.load(spec, precision.dtype)[0].loaded.model
    with lora_attached(model, spec.lora, spec.seed) as adapted:
        before = torch.get_rng_state()
        need = measure_need(adapted, trainable(adapted), np.arange(5, 20), 0.5, precision)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in adapted.parameters())
        assert not adapted.training
    assert need.fixed > 0
    assert need.per_token > 0


@pytest.mark.slow
def test_the_peak_of_a_real_step_stays_within_the_need(tmp_path: Path) -> None:
    """Resident memory as the system sees it, in a process of its own, on a model whose needs are not lost in noise."""
    with get_context("spawn").Pool(1) as pool:
        loaded, peak, need = pool.apply(steps_of_memory, (tmp_path,))
    assert 0.5 * need < peak - loaded < need


def steps_of_memory(root: Path) -> tuple[float, float, float]:
    """(resident before training, peak of three steps, need beside the former), MB of 10^6 bytes."""
    torch.set_num_threads(1)
    store, tokens = LocalArtifactStore(root / "artifacts"), 1024
    base = tiny_catalogue(write_tiny_model(root / "model", hidden=256, layers=20)).get("tiny")
    prepare_base(base, store)
    spec = JobSpec(
        base="tiny", base_revision=base.revision, training_file="f", training_sha256="s", base_precision="fp32"
    )
    precision = choose_precision(spec, CPU)
    model = WarmBases(Catalogue((base,)), store, CPU).load(spec, precision.dtype)[0].loaded.model
    row = np.arange(tokens) % 300 + 3, np.arange(tokens) > tokens // 4
    with lora_attached(model, spec.lora, spec.seed) as adapted:
        parameters = trainable(adapted)
        optimizer = make_optimizer(parameters, spec.hyperparameters)

        def step(tokens: int) -> None:
            packed = pack([(row[0][-tokens:], row[1][-tokens:] & (np.arange(tokens) > 0))], CPU)
            rates = {"learning_rate": 1e-4, "max_grad_norm": 1.0}
            with training_forward(adapted, dropout=True):
                take_step(adapted, parameters, optimizer, [packed], precision=precision, check=ignore, **rates)

        # The libraries' own pages come with the first step, and belong to no job.
        step(8)
        need = measure_need(adapted, parameters, row[0], 0.75, precision)
        loaded = psutil.Process().memory_info().rss / 1e6
        reset_peak_memory(CPU)
        for _ in range(3):
            step(tokens)
        return loaded, peak_memory_mb(CPU), need.of(tokens) / 1e6


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 1 << 62),
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 1\n"}, 1 << 62),
        ({"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 1\ninactive_file 300\n"}, 400),
        ({"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": ""}, 100),
        ({"memory.max": "1000\n"}, 1 << 62),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], left: int) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cgroup_bytes(tmp_path) == left


def test_free_memory_is_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = free_bytes(CPU)
    assert 0 < found < psutil.virtual_memory().total
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    for name, text in (("memory.max", "1000"), ("memory.current", "400"), ("memory.stat", "")):
        (tmp_path / name).write_text(text)
    assert free_bytes(CPU) == 600


@pytest.mark.parametrize(
    ("free", "share", "expected"),
    [
        (1000, 1.0, 1000 + 300),
        # The card has more than this process may take.
        (1000, 0.5, 1000 - 800 + 300),
        # Others have taken it.
        (50, 0.5, 50 + 300),
        # It has been given less than it holds already.
        (1000, 0.25, 300),
    ],
)
def test_a_gpus_free_memory_is_no_more_than_this_process_may_take(
    monkeypatch: pytest.MonkeyPatch, free: int, share: float, expected: int
) -> None:
    # A MOCK of a GPU of 2,000 bytes, of which the allocator has reserved 800 and uses 500.
    told: dict[str, Any] = {"mem_get_info": (free, 2000), "memory_reserved": 800, "memory_allocated": 500}
    for name, value in (told | {"get_per_process_memory_fraction": share}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert free_bytes(torch.device("cuda")) == expected


def test_out_of_memory_names_the_numbers_that_were_known(tiny: TinyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"{n}?", "output": "It is long. " * 200} for n in range(4)]
    session = RecordingSession()
    monkeypatch.setattr("services.trainer.recipe.step.loss_sum", lambda *_: torch.empty(2**60))
    with pytest.raises(JobFailed) as failure:
        finetune(
            JobRun("ftjob-one", 1, tiny.spec(rows)), tiny.bases, tiny.store, session, free_memory=lambda _: 2_000_000
        )
    (data,) = [data for _, message, data in session.events if "are free" in message]
    fit = data["max_length"]
    assert failure.value.message == f"out of memory; max_length {fit} (now 512) with batch_size 1 (now 4) would fit"
    assert (failure.value.code, failure.value.param) == ("out_of_memory", "hyperparameters.max_length")


@pytest.mark.parametrize(("within", "budget"), [(100_000, 16_384), (5_000, 5_000), (900, 900), (100, 700), (0, 700)])
def test_a_gpus_budget_is_what_fits_but_a_whole_row_at_least(within: int, budget: int) -> None:
    need = Need(fixed=1e6, per_token=1e3)
    lengths = np.array([20, 700, 31], np.int64)
    assert fitting_budget(need, int(need.of(within)) if within else 0, lengths, 16_384) == budget


def test_a_step_without_memory_is_done_again_in_smaller_micro_batches(
    tiny: TinyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU would: the result differs by the order of sums only."""
    hyper = {"adam_epsilon": 1e-2}
    spec = tiny.spec(validation=instruction_rows(9, start=30), lora=LoraSpec(dropout=0), hyper=hyper)
    whole = tiny.finish(spec, job="ftjob-whole", bases=tiny.fresh_bases()).report
    sizes: list[int] = []

    def step(model: Any, parameters: Any, optimizer: Any, packs: list[Packed], **rest: Any) -> StepResult:
        sizes.append(max(packed.tokens for packed in packs))
        if sizes[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return take_step(model, parameters, optimizer, packs, **rest)

    def evaluation(model: Any, rows: Any, token_budget: int, *rest: Any) -> float:
        if token_budget > 400:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluation_loss(model, rows, token_budget, *rest)

    monkeypatch.setattr(recipe, "take_step", step)
    monkeypatch.setattr(recipe, "evaluation_loss", evaluation)
    session = RecordingSession()
    report = tiny.finish(spec, session, job="ftjob-small", bases=tiny.fresh_bases()).report
    assert max(sizes) > 100 >= sizes[-1]
    assert report.steps == whole.steps
    model = tiny.bases.load(spec, torch.float32)[0].loaded.model
    bound = rounding(torch.float32, llama_sums(model.config, 150, backward=True))
    assert report.train_loss == pytest.approx(whole.train_loss, rel=bound)
    assert report.eval_loss_after == pytest.approx(whole.eval_loss_after, rel=bound)
    budgets = [data["token_budget"] for _, message, data in session.events if "from now on they have" in message]
    assert budgets == sorted(budgets, reverse=True)
    assert sizes[-1] <= budgets[-1]


def test_a_row_that_has_no_memory_alone_ends_the_job(tiny: TinyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> StepResult:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(recipe, "take_step", never)
    with pytest.raises(JobFailed) as failure:
        tiny.run(tiny.spec())
    assert failure.value.code == "out_of_memory"


def test_where_nothing_would_fit_that_is_said(tiny: TinyJob) -> None:
    session = RecordingSession()
    job = JobRun("ftjob-one", 1, tiny.spec())
    finetune(job, tiny.bases, tiny.store, session, free_memory=lambda _: 1000)
    (message,) = [message for _, message, _ in session.events if "are free" in message]
    assert "no max_length would fit; a base_precision of fewer bits or a smaller base might" in message
