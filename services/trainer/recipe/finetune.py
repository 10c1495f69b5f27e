"""The recipe: one job from rows to a published adapter, top to bottom.

Knows no queue, no SQL and no HTTP: what it needs is handed in, and all it says goes through the session. It ends in
`Finished` or `Stopped`, or raises `JobFailed` (the job cannot succeed) or whatever the session raises (the lease is
gone).
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel

from services.trainer.contract import Finished, JobRun, Outcome, Session, Stopped, StopRequested, stop_check
from services.trainer.data.dataset import Rows, prepare_data
from services.trainer.data.layout import most_tokens, plan_layout
from services.trainer.data.split import hold_out
from services.trainer.model.bases import WarmBases
from services.trainer.model.forward import training_forward
from services.trainer.model.lora import lora_attached, parameter_counts, trainable
from services.trainer.model.malloc import release_free_memory
from services.trainer.model.precision import choose_precision
from services.trainer.recipe.adapter import adapter_manifest, write_adapter
from services.trainer.recipe.checkpoint import TrainingState, prune, publish_state, resume
from services.trainer.recipe.checks import check_base_unchanged, check_reload, check_trained, sample_logits
from services.trainer.recipe.context import Clock, RunContext
from services.trainer.recipe.eta import Throughput
from services.trainer.recipe.evaluate import evaluation_loss
from services.trainer.recipe.initial import load_initial_adapter
from services.trainer.recipe.memory import FreeMemory, fitting_budget, free_bytes, measure_need, shortage
from services.trainer.recipe.metrics import History, matmul_parameters, reset_peak_memory
from services.trainer.recipe.out_of_memory import out_of_memory_explained
from services.trainer.recipe.reports import (
    metrics_of,
    progress_of,
    report_on,
    tell_about_adapter,
    tell_about_base,
    tell_about_early_stop,
    tell_about_rows,
    tell_about_shortage,
    tell_about_smaller_micro_batches,
    tell_metrics,
)
from services.trainer.recipe.rng import RandomState
from services.trainer.recipe.schedule import learning_rate
from services.trainer.recipe.step import MAX_SKIPPED_STEPS, StepResult, make_optimizer, take_step
from shared.errors import JobFailed
from shared.jobs.spec import Phase
from shared.storage.artifacts import LocalArtifactStore, Manifest

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
) -> Outcome:
    """Run a job to its end, or to where it is asked to stop.

    Args:
        candidates: committed resume states of earlier claims, newest first.
        free_memory: bytes that can still be had on a device.

    Raises:
        JobFailed: trying again would not help; the message says what to change.
        LeaseLost: from the session; nothing more was written.
    """
    run: RunContext | None = None
    try:
        with out_of_memory_explained(lambda: run.shortage if run else None):
            run = prepare(job, bases, store, session, peak_flops or {}, clock, free_memory)
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
) -> RunContext:
    """Everything up to the LoRA weights: the rows first, so that a bad file fails before any model is loaded."""
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
    tell_about_rows(session, data.training, layout)
    check()
    base, seconds = bases.load(spec, precision.dtype)
    tell_about_base(session, base, seconds)
    return RunContext(
        job=job,
        base=base,
        data=data,
        layout=layout,
        precision=precision,
        store=store,
        session=session,
        check=check,
        clock=clock,
        base_loaded=seconds is not None,
        throughput=Throughput(cold=seconds is not None),
        matmul_weights=matmul_parameters(base.loaded.model),
        peak_flops=peak_flops.get(precision.dtype),
        free_memory=free_memory,
        token_budget=layout.token_budget,
    )


def adapt(run: RunContext, candidates: Sequence[Path]) -> Outcome:
    """Train LoRA weights on the base, and publish them once they have passed every check."""
    spec, loaded = run.job.spec, run.base.loaded
    with ExitStack() as staging:
        with lora_attached(loaded.model, spec.lora, spec.seed) as model:
            counts = parameter_counts(model)
            tell_about_adapter(run.session, counts)
            look_at_memory(run, model)
            if spec.initial_adapter:
                load_initial_adapter(model, spec.initial_adapter, run.base, run.store)
            state = begin(run, model, candidates)
            try:
                train(run, model, state)
            except StopRequested:
                save_where_it_stands(run, model, state)
                return Stopped(step=state.history.step)
            run.session.phase(Phase.SAVING)
            check_trained(model)
            folder = staging.enter_context(run.store.staged())
            write_adapter(folder, model, loaded.base)
            sample = run.sample()
            expected = sample_logits(model, sample, run.precision)
        check_base_unchanged(run.base)
        check_reload(run.base, folder, sample, expected, run.precision)
        adapter_id = run.session.reserve_adapter()
        manifest = publish_adapter(run, folder, adapter_id, state.history.step)
    return Finished(adapter_id, manifest, report_on(run, state.history, counts))


def look_at_memory(run: RunContext, model: PeftModel) -> None:
    """Fit a GPU's micro-batches to its memory, and say beforehand if even the largest of those will hardly fit."""
    rows, hyper = run.data.training, run.job.spec.hyperparameters
    longest = int(rows.lengths.argmax())
    share = max(rows.targets[longest] / rows.lengths[longest], rows.targets.sum() / rows.lengths.sum())
    need = measure_need(model, trainable(model), rows[longest][0], float(share), run.precision)
    free = run.free_memory(run.device)
    if run.device.type == "cuda":
        run.token_budget = fitting_budget(need, free, rows.lengths, run.token_budget)
    run.shortage = shortage(need, free, rows.lengths, hyper, run.token_budget)
    if run.shortage:
        tell_about_shortage(run.session, run.shortage)


def begin(run: RunContext, model: PeftModel, candidates: Sequence[Path]) -> TrainingState:
    """A run at step 0, or where its newest usable checkpoint left it."""
    parameters = trainable(model)
    state = TrainingState(
        parameters=parameters,
        optimizer=make_optimizer(parameters, run.job.spec.hyperparameters),
        scaler=run.precision.scaler,
        history=History(),
        random=RandomState.capture(run.device),
    )
    folder = resume(candidates, run.store, state, run.identity, run.session, run.device)
    if folder is not None:
        run.resume_states = list(reversed(candidates[candidates.index(folder) :]))
    return state


def train(run: RunContext, model: PeftModel, state: TrainingState) -> None:
    """All steps that are left, with the loss on held-out rows before, on the way and after.

    Raises:
        StopRequested: `state` is that of the last whole step.
    """
    history, layout = state.history, run.layout
    if run.checkpoint_due(history.step):
        # Step 0; or a step whose evaluation a stop has cut short, which early stopping must not miss.
        evaluate(run, model, history)
    run.session.phase(Phase.TRAINING)
    first = history.step
    while history.step < layout.total_steps and not run.gives_up(history):
        one_step(run, model, state)
        if history.step == first + 1:
            run.session.first_step(base_loaded=run.base_loaded)
        run.session.progress(progress_of(run, history))
        due = run.checkpoint_due(history.step)
        if due:
            evaluate(run, model, history)
        if due or history.step % run.job.spec.hyperparameters.metrics_steps == 0:
            metrics = tell_metrics(run, history)
        if due:
            save(run, model, state, metrics)
    evaluate(run, model, history)
    tell_about_early_stop(run, history)


def one_step(run: RunContext, model: PeftModel, state: TrainingState) -> None:
    """The next optimizer step, whole or not at all."""
    history, started = state.history, run.clock()
    while (result := try_step(run, model, state)) is None:
        # Only now has the failed pass let go of its tensors.
        torch.cuda.empty_cache()
    state.random = RandomState.capture(run.device)
    seconds = run.clock() - started
    history.add(result, seconds)
    run.throughput.add(result.tokens, seconds)
    if history.skipped_in_a_row > MAX_SKIPPED_STEPS:
        raise JobFailed(
            f"{history.skipped_in_a_row} steps in a row overflowed fp16; use compute_dtype fp32 or bf16",
            code="non_finite_loss",
        )


def try_step(run: RunContext, model: PeftModel, state: TrainingState) -> StepResult | None:
    """The next step; None, and smaller micro-batches from now on, if a GPU had no memory for the largest one."""
    step, hyper = state.history.step, run.job.spec.hyperparameters
    packs = run.packs(step)
    most = max(packed.tokens for packed in packs)
    run.tokens_at_once = max(run.tokens_at_once, most)
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
        if isinstance(error, StopRequested) or not run.halve_budget(most, longest):
            raise
        tell_about_smaller_micro_batches(run.session, most, run.token_budget)
        return None


def evaluate(run: RunContext, model: PeftModel, history: History) -> None:
    """Loss on the validation file after the steps done so far, unless it is known or there is no such file."""
    rows = run.data.validation
    if rows is None or history.valid_loss(history.step) is not None:
        return
    run.session.phase(Phase.EVALUATING)
    loss, run.evaluation_seconds = held_out_loss(run, model, rows, untrained=history.step == 0)
    history.valid_losses.append((history.step, loss))
    if history.step == 0:
        run.session.event(f"Validation loss before training: {loss:.4f}", data={"step": 0, "valid_loss": loss})
    run.session.phase(Phase.TRAINING)


def held_out_loss(run: RunContext, model: PeftModel, rows: Rows, *, untrained: bool) -> tuple[float, float]:
    """(loss, seconds that takes). While LoRA is zero it is the base's own, and no warm base is asked twice."""
    known, key = run.base.untrained_losses, (rows.key, run.layout.token_budget)
    # Who continues an adapter begins elsewhere.
    bases_own = untrained and run.job.spec.initial_adapter is None
    if bases_own and key in known:
        return known[key]
    started = run.clock()
    while (loss := try_evaluation(run, model, rows)) is None:
        torch.cuda.empty_cache()
    found = loss, run.clock() - started
    if bases_own:
        known[key] = found
    return found


def try_evaluation(run: RunContext, model: PeftModel, rows: Rows) -> float | None:
    """The loss on all rows; None, and smaller micro-batches from now on, if a GPU had no memory for the largest one."""
    try:
        return evaluation_loss(model, rows, run.token_budget, run.precision, run.check)
    except torch.OutOfMemoryError:
        most = most_tokens(rows.lengths, len(rows), run.token_budget)
        if not run.halve_budget(most, int(rows.lengths.max())):
            raise
        tell_about_smaller_micro_batches(run.session, most, run.token_budget)
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
    run.session.commit_checkpoint(step=state.history.step, adapter_id=adapter_id, metrics=losses)
    state.saved_step = state.history.step
    run.resume_states.append(resume_state)
    prune(run.store, run.resume_states)
    run.session.phase(Phase.TRAINING)


def save_where_it_stands(run: RunContext, model: PeftModel, state: TrainingState) -> None:
    """On a stop: nothing of the work is lost."""
    if state.history.step > state.saved_step:
        save(run, model, state, metrics_of(run, state.history))


def publish_adapter(run: RunContext, folder: Path, adapter_id: str, step: int) -> Manifest:
    manifest = adapter_manifest(run.job, adapter_id, step, run.base, run.data.training.template)
    return run.store.publish(folder, run.store.adapter(adapter_id), manifest)
