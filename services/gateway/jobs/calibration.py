"""What finished jobs have measured, for estimates of jobs like them: medians of throughput and memory."""

import statistics
from dataclasses import dataclass

from sqlalchemy import Connection, select

from shared.jobs.spec import JobSpec, State, TrainingReport
from shared.storage.tables import jobs
from shared.training.memory import ModelShape, peak_memory_mb

CALIBRATION_JOBS = 5
SEARCHED_JOBS = 100


@dataclass(frozen=True, slots=True)
class Calibration:
    """Medians over finished jobs.

    Attributes:
        tokens_per_second: real tokens per second of training time.
        peak_memory_mb: of the worker, MB of 10^6 bytes.
        memory_beyond_model_mb: how much more was taken than the memory model says; None if it says nothing.
    """

    tokens_per_second: float
    peak_memory_mb: float
    memory_beyond_model_mb: float | None = None


def calibrate(connection: Connection, spec: JobSpec, shape: ModelShape | None = None) -> Calibration | None:
    """Medians over the newest finished jobs of the same base and precision; of the same preset, if there are any.

    Args:
        shape: of the base, if its memory can be computed.

    Returns:
        None if no such job has finished here.
    """
    query = (
        select(jobs.c.report, jobs.c.spec)
        .where(
            jobs.c.state == State.SUCCEEDED,
            jobs.c.report.is_not(None),
            jobs.c.spec["base"].as_string() == spec.base,
            jobs.c.spec["base_precision"].as_string() == spec.base_precision,
            jobs.c.spec["compute_dtype"].as_string() == spec.compute_dtype,
        )
        .order_by(jobs.c.finished_at.desc())
        .limit(SEARCHED_JOBS)
    )
    found = [
        (TrainingReport.model_validate(report), JobSpec.model_validate(of)) for report, of in connection.execute(query)
    ]
    newest = ([(report, of) for report, of in found if of.preset == spec.preset] or found)[:CALIBRATION_JOBS]
    if not newest:
        return None
    beyond = [
        report.peak_memory_mb - peak_memory_mb(shape, of.base_precision, of.lora, report.tokens_at_once)
        for report, of in newest
        if shape and report.tokens_at_once
    ]
    return Calibration(
        statistics.median(report.tokens_per_second for report, _ in newest),
        statistics.median(report.peak_memory_mb for report, _ in newest),
        statistics.median(beyond) if beyond else None,
    )
