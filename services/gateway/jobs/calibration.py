"""What finished jobs have measured, for estimates of jobs like them on the same kind of device."""

import statistics
from dataclasses import dataclass

from sqlalchemy import Connection, select

from shared.jobs.spec import DeviceKind, JobSpec, State, TrainingReport
from shared.storage.tables import jobs
from shared.training.memory import ModelShape, peak_memory_mb

CALIBRATION_JOBS = 5
SEARCHED_JOBS = 100


@dataclass(frozen=True, slots=True)
class MeasuredPeak:
    """What one finished job took of its device.

    Attributes:
        tokens: of its largest micro-batch.
        base_mb, peak_mb: of the loaded base, and in all, MB of 10^6 bytes.
    """

    tokens: int
    base_mb: float
    peak_mb: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Medians over the newest finished jobs, and what each of them took.

    Attributes:
        tokens_per_second: real tokens per second of training time.
        peak_memory_mb: of the worker, MB of 10^6 bytes.
        memory_beyond_model_mb: how much more was taken than the memory model of a CPU says; None if it says nothing.
        peaks: newest first, of more jobs than the medians are of.
    """

    tokens_per_second: float
    peak_memory_mb: float
    memory_beyond_model_mb: float | None = None
    peaks: tuple[MeasuredPeak, ...] = ()


def calibrate(
    connection: Connection, spec: JobSpec, device: DeviceKind | None, shape: ModelShape | None = None
) -> Calibration | None:
    """What finished jobs of the same base, precision and device measured; of the same preset, if there are any.

    Args:
        device: what the job will be computed on, if that is known. Reports of old versions do not name theirs: they
            count where no others do, but never as a GPU's.
        shape: of the base, if its memory can be computed.

    Returns:
        None if no such job has finished here.
    """
    found = _finished(connection, spec, device)
    if not found and device == "cpu":
        found = _finished(connection, spec, None)
    alike = [(report, of) for report, of in found if of.preset == spec.preset] or found
    newest = alike[:CALIBRATION_JOBS]
    if not newest:
        return None
    beyond = [
        report.peak_memory_mb - peak_memory_mb(shape, of.base_precision, of.lora, report.tokens_at_once)
        for report, of in newest
        if shape and report.tokens_at_once and device != "cuda"
    ]
    return Calibration(
        statistics.median(report.tokens_per_second for report, _ in newest),
        statistics.median(report.peak_memory_mb for report, _ in newest),
        statistics.median(beyond) if beyond else None,
        tuple(
            MeasuredPeak(report.tokens_at_once, report.base_mb, report.peak_memory_mb)
            for report, _ in alike
            if report.tokens_at_once
        ),
    )


def _finished(connection: Connection, spec: JobSpec, device: DeviceKind | None) -> list[tuple[TrainingReport, JobSpec]]:
    """Finished jobs like `spec` whose reports name this device, or none, newest first."""
    query = (
        select(jobs.c.report, jobs.c.spec)
        .where(
            jobs.c.state == State.SUCCEEDED,
            jobs.c.report.is_not(None),
            jobs.c.report["device"].as_string().is_not_distinct_from(device),
            jobs.c.spec["base"].as_string() == spec.base,
            jobs.c.spec["base_precision"].as_string() == spec.base_precision,
            jobs.c.spec["compute_dtype"].as_string() == spec.compute_dtype,
        )
        .order_by(jobs.c.finished_at.desc())
        .limit(SEARCHED_JOBS)
    )
    found = connection.execute(query)
    return [(TrainingReport.model_validate(report), JobSpec.model_validate(of)) for report, of in found]
