"""A job in words and figures for people: its line in a list, and its page."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from tunesmith.progress import duration, stage_of

Json = dict[str, Any]
COLUMNS = ("job", "suffix", "state", "age", "step", "loss", "ETA", "base", "model")
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def line_of(job: Json, clock: Callable[[], float] = time.time) -> tuple[object, ...]:
    """A job's cells under `COLUMNS`; None for what is not known.

    Args:
        clock: seconds since the epoch.
    """
    progress = job.get("progress") or {}
    running = job["status"] == "running"
    eta = progress.get("eta_seconds") if running else None
    return (
        job["id"],
        job.get("suffix"),
        job.get("state") or job["status"],
        None if job.get("created_at") is None else age(clock() - job["created_at"]),
        _steps(progress),
        None if progress.get("loss") is None else f"{progress['loss']:.3f}",
        None if eta is None else duration(eta),
        job["model"],
        job.get("fine_tuned_model"),
    )


def age(seconds: float) -> str:
    """A duration by its largest unit alone: 45s, 12min, 3h, 8d."""
    whole = max(0, int(seconds))
    return next((f"{whole // size}{unit}" for size, unit in _UNITS if whole >= size), "0s")


def page_of(job: Json) -> list[tuple[str, str]]:
    """What a person asks of a job, as names and values; what is not known is left out."""
    progress, hyperparameters = job.get("progress") or {}, job.get("hyperparameters") or {}
    report, fault = job.get("report") or {}, job.get("error") or {}
    texts: list[tuple[str, Any]] = [
        ("job", job["id"]),
        ("state", stage_of(job)),
        ("suffix", job.get("suffix")),
        ("base", _base(job)),
        ("model", job.get("fine_tuned_model")),
        ("error", fault.get("message")),
        ("created", _date(job.get("created_at"))),
        ("started", _date(job.get("started_at"))),
        ("finished", _date(job.get("finished_at"))),
        ("files", " ".join(job.get("training_files") or [job.get("training_file") or ""])),
        ("validation", job.get("validation_file")),
        ("preset", job.get("preset")),
        ("epochs", hyperparameters.get("n_epochs")),
        ("batch size", hyperparameters.get("batch_size")),
        ("learning rate", hyperparameters.get("learning_rate")),
        ("step", _steps(progress)),
        ("loss", _figure(progress.get("loss"))),
        ("held-out loss", _figure(report.get("valid_loss"))),
        ("ETA", _left(job, progress)),
        ("attempt", job.get("attempt")),
        *(("warning", warning) for warning in job.get("warnings") or []),
    ]
    return [(name, str(value)) for name, value in texts if value not in (None, "")]


def when(seconds: float) -> str:
    """Date and time on this machine's clock, seconds since the epoch."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else when(seconds)


def _steps(progress: Json) -> str | None:
    total = progress.get("total_steps")
    return f"{progress.get('step') or 0}/{total}" if total else None


def _base(job: Json) -> str:
    precision = job.get("base_precision")
    return f"{job['model']} ({precision})" if precision else str(job["model"])


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _left(job: Json, progress: Json) -> str | None:
    eta = progress.get("eta_seconds")
    return duration(eta) if eta is not None and job["status"] == "running" else None
