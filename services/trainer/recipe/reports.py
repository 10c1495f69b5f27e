"""What a run reports: events, progress, metrics, and the final report."""

from services.trainer.contract import Session
from services.trainer.data.dataset import Rows
from services.trainer.data.layout import Layout
from services.trainer.model.bases import TrainableBase
from services.trainer.recipe.context import RunContext
from services.trainer.recipe.memory import Shortage
from services.trainer.recipe.metrics import History, peak_memory_mb, utilisation
from services.trainer.recipe.schedule import learning_rate
from services.trainer.recipe.state import TrainingState
from shared.bases.device import device_kind
from shared.jobs.spec import Progress, TrainingReport
from shared.logs import get_logger

log = get_logger(__name__)

# Adam moves a weight by at most about the learning rate in a step (Kingma and Ba 2015, 2.1), so that their sum bounds
# what a run changes. The tutorial's three rows with its recipe come to 4e-4; 15 steps of quickstart rows, which are
# learnt, to 6e-3.
LITTLE_CHANGE = 2e-3


def report_rows(session: Session, rows: Rows, layout: Layout) -> None:
    tokens, supervised = int(rows.lengths.sum()), int(rows.supervised.sum())
    data = {
        "rows": len(rows),
        "dropped_rows": rows.dropped,
        "truncated_rows": rows.truncated,
        "last_turn_only_rows": rows.last_turn_only,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "total_steps": layout.total_steps,
    }
    log.info("rows ready", **data)
    session.event(f"{len(rows)} rows, {tokens} tokens, {supervised} of them supervised", data=data)
    if rows.dropped or rows.truncated:
        session.event(
            f"{rows.truncated} rows were cut at max_length, {rows.dropped} more were dropped: nothing of them was left "
            "to learn",
            level="warn",
            data={"dropped_rows": rows.dropped, "truncated_rows": rows.truncated},
        )
    if rows.last_turn_only:
        session.event(
            f"of {rows.last_turn_only} rows only the last reply is learnt: the chat template writes earlier ones "
            "differently once the conversation goes on",
            level="warn",
            data={"last_turn_only_rows": rows.last_turn_only},
        )


def report_base(session: Session, base: TrainableBase, seconds: float | None) -> None:
    loaded = base.loaded
    data = {
        "base": loaded.base.id,
        "precision": loaded.precision,
        "quantized_layers": loaded.quantized_layers,
        "base_mb": round(loaded.megabytes, 1),
        "base_loaded": seconds is not None,
        "load_seconds": None if seconds is None else round(seconds, 2),
    }
    kind = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}.get(loaded.precision, "quantised")
    how = "was already loaded" if seconds is None else f"loaded in {seconds:.1f} s"
    log.info("base ready", layer_class=kind, **data)
    session.event(
        f"Base {loaded.base.id} {how}: {loaded.precision}, {loaded.quantized_layers} {kind} layers, "
        f"{loaded.megabytes:.0f} MB",
        data=data,
    )


def report_adapter(session: Session, counts: tuple[int, int]) -> None:
    trained, total = counts
    log.info("adapter attached", trainable_params=trained, total_params=total)
    session.event(
        f"Training {trained:,} of {total:,} parameters", data={"trainable_params": trained, "total_params": total}
    )


def report_shortage(session: Session, shortage: Shortage) -> None:
    needed, free = shortage.needed / 1e6, shortage.free / 1e6
    data = {"tokens": shortage.tokens, "needed_mb": round(needed, 1), "free_mb": round(free, 1), **shortage.smaller}
    log.warning("memory is short", **data)
    session.event(
        f"A micro-batch of {shortage.tokens:,} tokens needs about {needed:,.0f} MB beside the base, {free:,.0f} MB "
        f"are free: {shortage.advice}. Training is tried all the same",
        level="warn",
        data=data,
    )


def report_smaller_micro_batches(session: Session, tokens: int, budget: int) -> None:
    log.warning("out of memory, trying smaller micro-batches", tokens=tokens, token_budget=budget)
    session.event(
        f"The GPU had no memory for a micro-batch of {tokens:,} tokens; from now on they have at most {budget:,}. The "
        "result is the same but for rounding",
        level="warn",
        data={"tokens": tokens, "token_budget": budget},
    )


def progress_of(run: RunContext, state: TrainingState) -> Progress:
    layout, history = run.layout, state.history
    return Progress(
        step=history.step,
        total_steps=layout.total_steps,
        epoch=layout.epoch(history.step),
        loss=history.window_loss,
        tokens_per_second=round(history.tokens_per_second, 2),
        eta_seconds=_eta_seconds(run, state),
    )


def _eta_seconds(run: RunContext, state: TrainingState) -> float | None:
    """Seconds that the remaining steps and evaluations will take; None before the first step."""
    layout, claim, step = run.layout, state.claim, state.history.step
    total = layout.total_steps
    seconds = claim.throughput.seconds_for(layout.tokens_before(total) - layout.tokens_before(step), total - step)
    if seconds is None:
        return None
    evaluations = 0 if run.data.validation is None else layout.plan.checkpoints_after(step)
    return round(seconds + evaluations * claim.evaluation_seconds, 1)


def metrics_of(run: RunContext, history: History) -> dict[str, float]:
    """One point of the job's series: means over the steps since the last metrics event."""
    step = history.step
    values: dict[str, float | None] = {
        "step": step,
        "epoch": run.layout.epoch(step),
        "train_loss": history.window_loss,
        "learning_rate": learning_rate(step - 1, run.layout.total_steps, run.job.spec.hyperparameters),
        "grad_norm": history.grad_norm,
        "tokens_per_second": round(history.window_rate, 2),
        "trained_tokens": history.trained_tokens,
        "peak_memory_mb": round(peak_memory_mb(run.device), 1),
        "mfu": utilisation(history.window_rate, run.matmul_weights, run.peak_flops),
        "valid_loss": history.valid_loss(step),
    }
    return {key: value for key, value in values.items() if value is not None}


def report_metrics(run: RunContext, history: History) -> dict[str, float]:
    """Send a metrics event and start the next window."""
    metrics = metrics_of(run, history)
    valid = f", validation loss={metrics['valid_loss']:.4f}" if "valid_loss" in metrics else ""
    message = f"Step {history.step}/{run.layout.total_steps}: training loss={metrics['train_loss']:.4f}{valid}"
    run.session.event(message, type="metrics", data=metrics | {"total_steps": run.layout.total_steps})
    history.window.clear()
    return metrics


def report_early_stop(run: RunContext, history: History) -> None:
    if history.step < run.layout.total_steps and history.best:
        step, loss = history.best
        run.session.event(
            f"Stopped early after step {history.step}: the validation loss was lowest at step {step}, {loss:.4f}",
            data={"step": history.step, "best_step": step, "valid_loss": loss},
        )


def report_little_change(run: RunContext, history: History) -> None:
    """Say it if the steps done can hardly be noticed in what the model writes."""
    hyper, total = run.job.spec.hyperparameters, run.layout.total_steps
    moved = sum(learning_rate(step, total, hyper) for step in range(history.step))
    if moved < LITTLE_CHANGE:
        steps = "1 optimizer step" if history.step == 1 else f"{history.step} optimizer steps"
        run.session.event(
            f"{steps} changed little: the model answers much like what it began with; "
            "more epochs (n_epochs), or the preset 'recommended' without n_epochs and batch_size, teach more",
            level="warn",
            data={"step": history.step, "sum_of_learning_rates": moved},
        )


def training_report(run: RunContext, state: TrainingState, counts: tuple[int, int]) -> TrainingReport:
    loaded, rows, history = run.base.loaded, run.data.training, state.history
    trained, total = counts
    best_step, best_loss = history.best or (None, None)
    return TrainingReport(
        trainable_params=trained,
        total_params=total,
        trained_tokens=history.trained_tokens,
        total_tokens=history.total_tokens,
        steps=history.step,
        rows=len(rows),
        dropped_rows=rows.dropped,
        truncated_rows=rows.truncated,
        train_loss=history.mean_loss,
        eval_loss_before=history.valid_loss(0),
        eval_loss_after=history.valid_loss(history.step),
        best_step=best_step,
        best_eval_loss=best_loss,
        stopped_early=history.step < run.layout.total_steps,
        tokens_per_second=round(history.tokens_per_second, 2),
        mfu=utilisation(history.tokens_per_second, run.matmul_weights, run.peak_flops),
        device=device_kind(run.device),
        peak_memory_mb=round(peak_memory_mb(run.device), 1),
        tokens_at_once=state.claim.largest_micro_batch_tokens,
        grad_norm=history.grad_norm,
        quantized_layers=loaded.quantized_layers,
        base_mb=round(loaded.megabytes, 1),
    )
