"""`POST /v1/fine_tuning/estimates`: what a job would take, asked with the job's own body; nothing is created.

Steps and tokens come from the rows themselves, memory from the model's shape and the longest micro-batch, minutes from
what finished jobs of the same base and precision have measured; these also correct the memory. Before the first of them
there is nothing to say about time, and that is what is said.
"""

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field
from sqlalchemy import select

from services.gateway.bases.peak_memory import TOKEN_BUDGET, ModelShape, peak_memory_mb
from services.gateway.bases.tokenised import Row, tokenised_rows
from services.gateway.files.store import StoredFile
from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.jobs.request_schema import JobRequest
from services.gateway.jobs.resolution import optimizer_steps
from services.gateway.routes.dependencies import (
    ArtifactsDep,
    BasesDep,
    DatabaseDep,
    Project,
    ResolverDep,
    SourcesDep,
    TokenizersDep,
)
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, json_response
from shared.errors import InvalidRequest
from shared.jobs.spec import BasePrecision, JobSpec, State, TrainingReport
from shared.storage.database import Database
from shared.storage.tables import jobs

router = APIRouter(
    route_class=AuthenticatedRoute, tags=["fine-tuning"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY]
)
# Of a larger file so many rows are tokenised, and the rest is taken to be like them.
SAMPLED_ROWS = 2_000
CALIBRATION_JOBS = 5
SHUFFLES = 3
# A validation token costs the forward half of a training token's products.
EVALUATION_SHARE = 0.5


class EstimateJson(BaseModel):
    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    model: str
    base_precision: BasePrecision
    rows: int
    dropped_rows: Annotated[int, Field(description="nothing of their response is left within max_length")]
    total_steps: int
    tokens: Annotated[int, Field(description="real tokens over the whole run")]
    supervised_tokens: int
    calibration: Annotated[
        Literal["calibrated", "not calibrated"],
        Field(description="whether a job of this base and precision has finished here, whose rate is known"),
    ]
    tokens_per_second: float | None
    minutes: Annotated[float | None, Field(description="of training and evaluation; loading the base not counted")]
    peak_memory_mb: Annotated[
        float | None,
        Field(description="of the worker; before the first finished job what the model's shape says of one on a CPU"),
    ]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Amount:
    """What a file comes to: rows that teach, rows that are dropped, tokens of which some are supervised.

    Attributes:
        lengths: tokens of each row that was looked at.
    """

    rows: int
    dropped: int
    tokens: int
    targets: int
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Rate:
    """What finished jobs have measured.

    Attributes:
        beyond_shape_mb: how much more memory was taken than the model's shape says; None if it says nothing.
    """

    tokens_per_second: float
    peak_memory_mb: float
    beyond_shape_mb: float | None = None


@router.post("/v1/fine_tuning/estimates", response_model=EstimateJson)
def estimate_fine_tuning_job(
    database: DatabaseDep,
    artifacts: ArtifactsDep,
    bases: BasesDep,
    tokenizers: TokenizersDep,
    sources: SourcesDep,
    resolver: ResolverDep,
    project: Project,
    body: JobRequest,
) -> Response:
    """Steps, supervised tokens, minutes and memory of a job with this body."""
    with database.read() as tx:
        named = sources.load(tx, project, body)
    resolved = resolver.resolve(body, named)
    spec, tokenizer = resolved.spec, tokenizers.get(resolved.spec.base)

    def amount(file: StoredFile) -> Amount:
        rows = tokenised_rows(artifacts.file_data(file.id), tokenizer, spec.hyperparameters)
        return count(islice(rows, SAMPLED_ROWS), file.dataset["rows"])

    training = amount(named.training)
    validation = amount(named.validation) if named.validation else None
    facts = bases(spec.base)
    shape = facts.shape if facts else None
    rate = measured_rate(database, spec, shape)
    return json_response(estimate(spec, training, validation, rate, resolved.warnings, shape))


def count(sample: Iterator[Row], rows: int) -> Amount:
    """The amount of a file of `rows` rows, of which the first are `sample`."""
    seen = dropped = targets = 0
    lengths = []
    for row in sample:
        seen += 1
        if row.tokens is None:
            dropped += 1
        else:
            lengths.append(len(row.tokens.ids))
            targets += row.tokens.supervised_count
    scale = rows / max(1, seen)
    lost = round(dropped * scale)
    return Amount(rows - lost, lost, round(sum(lengths) * scale), round(targets * scale), tuple(lengths))


def largest_micro_batch(lengths: Sequence[int], batch_size: int) -> int:
    """Tokens of the largest micro-batch that steps of random rows come to; the trainer has an order of its own."""
    order = random.Random(0)  # noqa: S311
    epochs = [order.sample(lengths, len(lengths)) for _ in range(SHUFFLES)]
    steps = (sum(epoch[start : start + batch_size]) for epoch in epochs for start in range(0, len(epoch), batch_size))
    return max(max(lengths), min(TOKEN_BUDGET, max(steps)))


def estimate(
    spec: JobSpec,
    training: Amount,
    validation: Amount | None,
    rate: Rate | None,
    warnings: list[str],
    shape: ModelShape | None = None,
) -> EstimateJson:
    """Raises InvalidRequest if nothing is left to learn."""
    if training.rows == 0:
        raise InvalidRequest("no row has anything left to learn within max_length", param="hyperparameters.max_length")
    hyper = spec.hyperparameters
    held_out = round(hyper.validation_split * training.rows)
    rows = training.rows - held_out
    steps = optimizer_steps(rows, hyper)
    # How much of the rows the steps see; one epoch is 1.
    epochs = steps / math.ceil(rows / hyper.batch_size)
    share = epochs * rows / training.rows
    tokens, targets = round(training.tokens * share), round(training.targets * share)
    evaluated = validation.tokens if validation else training.tokens * held_out / training.rows
    # Before, and at every checkpoint: each epoch, every so many steps, and the end.
    checkpoints = math.ceil(epochs) + (steps // hyper.checkpoint_steps if hyper.checkpoint_steps else 0)
    worth = tokens + EVALUATION_SHARE * evaluated * (1 + checkpoints)
    return EstimateJson(
        model=spec.base,
        base_precision=spec.base_precision,
        rows=training.rows,
        dropped_rows=training.dropped,
        total_steps=steps,
        tokens=tokens,
        supervised_tokens=targets,
        calibration="calibrated" if rate else "not calibrated",
        tokens_per_second=rate.tokens_per_second if rate else None,
        minutes=round(worth / rate.tokens_per_second / 60, 2) if rate else None,
        peak_memory_mb=_peak_memory_mb(spec, training, rate, shape),
        warnings=warnings,
    )


def _peak_memory_mb(spec: JobSpec, training: Amount, rate: Rate | None, shape: ModelShape | None) -> float | None:
    if shape is None or not training.lengths:
        return rate.peak_memory_mb if rate else None
    tokens = largest_micro_batch(training.lengths, spec.hyperparameters.batch_size)
    beyond = rate.beyond_shape_mb or 0 if rate else 0
    return round(peak_memory_mb(shape, spec.base_precision, spec.lora, tokens) + beyond, 1)


def measured_rate(database: Database, spec: JobSpec, shape: ModelShape | None = None) -> Rate | None:
    """Medians over the newest finished jobs of the same base and precision; of the same preset, if there are any."""
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
        .limit(100)
    )
    with database.read() as connection:
        found = [
            (TrainingReport.model_validate(report), JobSpec.model_validate(of))
            for report, of in connection.execute(query)
        ]
    alike = [(report, of) for report, of in found if of.preset == spec.preset] or found
    if not alike:
        return None
    newest = alike[:CALIBRATION_JOBS]
    beyond = [
        report.peak_memory_mb - peak_memory_mb(shape, of.base_precision, of.lora, report.tokens_at_once)
        for report, of in newest
        if shape and report.tokens_at_once
    ]
    return Rate(
        statistics.median(report.tokens_per_second for report, _ in newest),
        statistics.median(report.peak_memory_mb for report, _ in newest),
        statistics.median(beyond) if beyond else None,
    )
