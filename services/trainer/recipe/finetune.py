"""The recipe: one job from rows to a published adapter, top to bottom.

Knows no queue, no SQL and no HTTP: everything it needs is an argument, and it reports through the session. It returns
`Finished` or `Stopped`, or raises `JobFailed` (the job cannot succeed) or what the session raises (the lease is lost).
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel

from services.trainer.contract import Finished, JobRun, Outcome, Session, Stopped, StopRequested, stop_check
from services.trainer.data.dataset import Rows, prepare_data
from services.trainer.data.layout import largest_micro_batch_tokens, plan_layout
from services.trainer.data.split import hold_out
from services.trainer.model.bases import WarmBases
from services.trainer.model.forward import training_forward
from services.trainer.model.lora import lora_attached, parameter_counts, trainable
from services.trainer.model.malloc import release_free_memory
from services.trainer.model.precision import choose_precision
from services.trainer.recipe.adapter import adapter_manifest, write_adapter
from services.trainer.recipe.batches import Batches
from services.trainer.recipe.checkpoint import prune, publish_state, resume
from services.trainer.recipe.checks import check_base_unchanged, check_reload, check_trained, sample_logits
from services.trainer.recipe.context import Clock, RunContext
from services.trainer.recipe.eta import Throughput
from services.trainer.recipe.evaluate import evaluation_loss
from services.trainer.recipe.free_memory import FreeMemory, free_bytes
from services.trainer.recipe.initial import load_initial_adapter
from services.trainer.recipe.memory import Shortage, fitting_budget, shortage
from services.trainer.recipe.memory_measurement import measure_need
from services.trainer.recipe.metrics import History, matmul_parameters, reset_peak_memory
from services.trainer.recipe.out_of_memory import out_of_memory_explained
from services.trainer.recipe.reports import (
    metrics_of,
    progress_of,
    report_adapter,
    report_base,
    report_early_stop,
    report_little_change,
    report_metrics,
    report_rows,
    report_shortage,
    report_smaller_micro_batches,
    training_report,
)
from services.trainer.recipe.rng import RandomState
from services.trainer.recipe.schedule import learning_rate
from services.trainer.recipe.state import ClaimState, TrainingState
from services.trainer.recipe.step import MAX_SKIPPED_STEPS, StepResult, make_optimizer, take_step
from shared.errors import JobFailed
from shared.jobs.spec import Phase
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import Manifest

# Failures after which the warm base may hold half an adapter or other weights: the next job loads it afresh.
SPOILS_THE_BASE = frozenset({"out_of_memory", "base_changed"})


def finetune(
    job: JobRun,
    bases: WarmBases,
    store: LocalArtifactStore,
    session: Session,
    candidates: Sequence[Path] = (),
    *,
    peak_flops: Mapping[torch.dtype, float] | None = None,
    clock: Clock = time.monotonic,
    free_memory: FreeMemory = free_bytes,
    strict_resume: bool = False,
    ahead: bool | None = None,
) -> Outcome:
    """Run a job to its end, or to where it is asked to stop.

    Args:
        candidates: committed resume states of earlier claims, newest first.
        free_memory: bytes that can still be allocated on a device.
        strict_resume: refuse to continue what was begun on a machine that computes otherwise.
        ahead: whether a thread makes the next step's micro-batches; None does that for GPUs alone.

    Raises:
        JobFailed: trying again would not help; the message says what to change.
        LeaseLost: from the session; nothing more was written.
    """
    try:
        with out_of_memory_explained():
            run = prepare(job, bases, store, session, peak_flops or {}, clock, free_memory, strict_resume, ahead)
            return adapt(run, candidates)
    except StopRequested:
        return Stopped(step=0)
    except JobFailed as failure:
        if failure.code in SPOILS_THE_BASE:
            bases.discard()
        raise
    finally:
        release_free_memory()


def prepare(
    job: JobRun,
    bases: WarmBases,
    store: LocalArtifactStore,
    session: Session,
    peak_flops: Mapping[torch.dtype, float],
    clock: Clock,
    free_memory: FreeMemory,
    strict_resume: bool,
    ahead: bool | None,
) -> RunContext:
    """Everything before the LoRA weights: the rows first, so that a bad file fails before any model is loaded."""
    spec = job.spec
    session.phase(Phase.PREPARING)
    reset_peak_memory(bases.device)
    check = stop_check(session)
    check()
    precision = choose_precision(spec, bases.device)
    data = prepare_data(spec, store, bases.tokenizer(spec), check)
    if data.validation is None and spec.hyperparameters.validation_split:
        data = hold_out(data.training, spec.hyperparameters.validation_split, spec.seed, check)
    layout = plan_layout(data.training.lengths, spec.hyperparameters, spec.seed, bases.device.type)
    report_rows(session, data.training, layout)
    check()
    base, seconds = bases.load(spec, precision.dtype)
    report_base(session, base, seconds)
    return RunContext(
        job=job,
        base=base,
        data=data,
        layout=layout,
        batches=Batches(data.training, layout, bases.device, ahead=ahead),
        precision=precision,
        store=store,
        session=session,
        check=check,
        clock=clock,
        base_loaded=seconds is not None,
        matmul_weights=matmul_parameters(base.loaded.model),
        peak_flops=peak_flops.get(precision.dtype),
        free_memory=free_memory,
        untrained_losses=bases.untrained_losses,
        strict_resume=strict_resume,
    )


def adapt(run: RunContext, candidates: Sequence[Path]) -> Outcome:
    """Train LoRA weights on the base, and publish them once they have passed every check."""
    spec, loaded = run.job.spec, run.base.loaded
    claim = ClaimState(run.layout.token_budget, Throughput(cold=run.base_loaded))
    with ExitStack() as stack:
        with lora_attached(loaded.model, spec.lora, spec.seed) as model:
            counts = parameter_counts(model)
            report_adapter(run.session, counts)
            stack.enter_context(out_of_memory_explained(check_memory(run, claim, model)))
            state = begin(run, claim, model, candidates)
            try:
                with run.batches:
                    train(run, model, state)
            except StopRequested:
                save_on_stop(run, model, state)
                return Stopped(step=state.history.step)
            run.session.phase(Phase.SAVING)
            check_trained(model)
            folder = stack.enter_context(run.store.staged())
            write_adapter(folder, model, loaded.base)
            sample = run.sample()
            expected = sample_logits(model, sample, run.precision)
        check_base_unchanged(run.base)
        check_reload(run.base, folder, sample, expected, run.precision)
        adapter_id = run.session.reserve_adapter()
        manifest = publish_adapter(run, folder, adapter_id, state.history.step)
    return Finished(adapter_id, manifest, training_report(run, state, counts))


def check_memory(run: RunContext, claim: ClaimState, model: PeftModel) -> Shortage | None:
    """Fit a GPU's micro-batches to its memory, and report beforehand if even the largest of those will hardly fit."""
    rows, hyper = run.data.training, run.job.spec.hyperparameters
    longest = int(rows.lengths.argmax())
    share = max(rows.supervised[longest] / rows.lengths[longest], rows.supervised.sum() / rows.lengths.sum())
    need = measure_need(model, trainable(model), rows[longest][0], float(share), run.precision)
    free = run.free_memory(run.device)
    if run.device.type == "cuda":
        claim.token_budget = fitting_budget(need, free, rows.lengths, claim.token_budget)
    short = shortage(need, free, rows.lengths, hyper, claim.token_budget)
    if short:
        report_shortage(run.session, short)
    return short


def begin(run: RunContext, claim: ClaimState, model: PeftModel, candidates: Sequence[Path]) -> TrainingState:
    """The state at step 0, or as the newest usable checkpoint has it: that needs no adapter it once began with."""
    parameters = trainable(model)
    state = TrainingState(
        parameters=parameters,
        optimizer=make_optimizer(parameters, run.job.spec.hyperparameters),
        scaler=run.precision.scaler,
        history=History(),
        random=RandomState.capture(run.device),
        claim=claim,
    )
    strict = run.strict_resume
    folder = resume(candidates, run.store, state, run.identity, run.session, run.device, strict=strict)
    if folder is not None:
        claim.resume_states = list(reversed(candidates[candidates.index(folder) :]))
    elif run.job.spec.initial_adapter:
        load_initial_adapter(model, run.job.spec.initial_adapter, run.base, run.store)
    return state


def train(run: RunContext, model: PeftModel, state: TrainingState) -> None:
    """All remaining steps, with the loss on held-out rows before the first, at checkpoints and at the end.

    Raises:
        StopRequested: `state` is that of the last whole step.
    """
    history, layout = state.history, run.layout
    if run.checkpoint_due(history.step):
        # Step 0; or a step whose evaluation a stop has cut short, which early stopping must not miss.
        evaluate(run, model, state)
    run.session.phase(Phase.TRAINING)
    first = history.step
    while history.step < layout.total_steps and not run.stops_early(history):
        train_step(run, model, state)
        if history.step == first + 1:
            run.session.first_step(base_loaded=run.base_loaded)
        run.session.progress(progress_of(run, state))
        due = run.checkpoint_due(history.step)
        if due:
            evaluate(run, model, state)
        if due or history.step % run.job.spec.hyperparameters.metrics_steps == 0:
            metrics = report_metrics(run, history)
        if due:
            save(run, model, state, metrics)
    evaluate(run, model, state)
    report_early_stop(run, history)
    report_little_change(run, history)


def train_step(run: RunContext, model: PeftModel, state: TrainingState) -> None:
    """The next optimizer step, whole or not at all."""
    history, started = state.history, run.clock()
    while (result := try_step(run, model, state)) is None:
        # The failed pass has released its tensors only now.
        torch.cuda.empty_cache()
    state.random = RandomState.capture(run.device)
    seconds = run.clock() - started
    history.add(result, seconds)
    state.claim.throughput.add(result.tokens, seconds)
    if history.skipped_in_a_row > MAX_SKIPPED_STEPS:
        raise JobFailed(
            f"{history.skipped_in_a_row} steps in a row overflowed fp16; use compute_dtype fp32 or bf16",
            code="non_finite_loss",
        )


def try_step(run: RunContext, model: PeftModel, state: TrainingState) -> StepResult | None:
    """The next step; None, and smaller micro-batches from now on, if a GPU had no memory for the largest one."""
    step, hyper, claim = state.history.step, run.job.spec.hyperparameters, state.claim
    packs = run.batches.take(step, claim.token_budget)
    largest = max(packed.tokens for packed in packs)
    claim.largest_micro_batch_tokens = max(claim.largest_micro_batch_tokens, largest)
    try:
        with training_forward(model, dropout=True):
            return take_step(
                model,
                state.parameters,
                state.optimizer,
                packs,
                learning_rate=learning_rate(step, run.layout.total_steps, hyper),
                max_grad_norm=hyper.max_grad_norm,
                precision=run.precision,
                check=run.check,
            )
    except (StopRequested, torch.OutOfMemoryError) as error:
        state.optimizer.zero_grad(set_to_none=True)
        state.random.restore(run.device)
        longest = max(max(packed.lengths) for packed in packs)
        if isinstance(error, StopRequested) or not claim.halve_token_budget(largest, longest):
            raise
        report_smaller_micro_batches(run.session, largest, claim.token_budget)
        return None


def evaluate(run: RunContext, model: PeftModel, state: TrainingState) -> None:
    """Loss on the held-out rows after the steps done so far, unless it is known or there are no such rows."""
    rows, history = run.data.validation, state.history
    if rows is None or history.valid_loss(history.step) is not None:
        return
    run.session.phase(Phase.EVALUATING)
    loss, state.claim.evaluation_seconds = held_out_loss(run, state.claim, model, rows, untrained=history.step == 0)
    history.valid_losses.append((history.step, loss))
    if history.step == 0:
        run.session.event(f"Validation loss before training: {loss:.4f}", data={"step": 0, "valid_loss": loss})
    run.session.phase(Phase.TRAINING)


def held_out_loss(
    run: RunContext, claim: ClaimState, model: PeftModel, rows: Rows, *, untrained: bool
) -> tuple[float, float]:
    """(loss, seconds that takes). While LoRA is zero it is the base's own, computed once for as long as it is warm."""
    budget = run.layout.token_budget
    # A job that continues an adapter does not start from the base's own loss.
    of_base = untrained and run.job.spec.initial_adapter is None
    if of_base and (known := run.untrained_losses.get(rows.key, budget)):
        return known
    started = run.clock()
    while (loss := try_evaluation(run, claim, model, rows)) is None:
        torch.cuda.empty_cache()
    seconds = run.clock() - started
    if of_base:
        run.untrained_losses.add(rows.key, budget, loss, seconds)
    return loss, seconds


def try_evaluation(run: RunContext, claim: ClaimState, model: PeftModel, rows: Rows) -> float | None:
    """The loss on all rows; None, and smaller micro-batches from now on, if a GPU had no memory for the largest one."""
    try:
        return evaluation_loss(model, rows, claim.token_budget, run.precision, run.check)
    except torch.OutOfMemoryError:
        largest = largest_micro_batch_tokens(rows.lengths, len(rows), claim.token_budget)
        if not claim.halve_token_budget(largest, int(rows.lengths.max())):
            raise
        report_smaller_micro_batches(run.session, largest, claim.token_budget)
        return None


def save(run: RunContext, model: PeftModel, state: TrainingState, metrics: dict[str, float]) -> None:
    """Checkpoint the last whole step, for resuming and for serving.

    The order (files durable first, the session's transaction last) is what makes a known checkpoint a usable one.
    """
    run.session.phase(Phase.SAVING)
    adapter_id = run.session.reserve_adapter()
    with run.store.staged() as folder:
        write_adapter(folder, model, run.base.loaded.base)
        publish_adapter(run, folder, adapter_id, state.history.step)
    template = run.data.training.template
    resume_state = publish_state(run.store, run.job, run.base, template, state, run.identity)
    losses = {key: value for key, value in metrics.items() if key in ("train_loss", "valid_loss")}
    removed = run.session.commit_checkpoint(step=state.history.step, adapter_id=adapter_id, metrics=losses)
    for gone in removed:
        run.store.remove(run.store.adapter(gone))
    state.saved_step = state.history.step
    state.claim.resume_states.append(resume_state)
    prune(run.store, state.claim.resume_states)
    run.session.phase(Phase.TRAINING)


def save_on_stop(run: RunContext, model: PeftModel, state: TrainingState) -> None:
    """Checkpoint on a stop, so that no whole step is lost."""
    if state.history.step > state.saved_step:
        save(run, model, state, metrics_of(run, state.history))


def publish_adapter(run: RunContext, folder: Path, adapter_id: str, step: int) -> Manifest:
    manifest = adapter_manifest(run.job, adapter_id, step, run.base, run.data.training.template)
    return run.store.publish(folder, run.store.adapter(adapter_id), manifest)
