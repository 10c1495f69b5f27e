"""`POST /v1/fine_tuning/estimates`: what a job would take, asked with the job's own body; nothing is created."""

from fastapi import APIRouter, Request, Response

from services.gateway.bases.tokenised import SAMPLED_ROWS, TokenCounts, count_tokens, tokenised_rows
from services.gateway.files.store import StoredFile
from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.http.small_pool import Check
from services.gateway.jobs.calibration import calibrate
from services.gateway.jobs.estimate import EstimateJson, estimate
from services.gateway.jobs.request_schema import JobRequest
from services.gateway.jobs.worker_device import newest_device
from services.gateway.routes.dependencies import (
    ArtifactsDep,
    BasesDep,
    DatabaseDep,
    Project,
    ResolverDep,
    SmallPoolDep,
    SourcesDep,
    TokenizersDep,
)
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, json_response

router = APIRouter(
    route_class=AuthenticatedRoute, tags=["fine-tuning"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY]
)


@router.post("/v1/fine_tuning/estimates", response_model=EstimateJson)
async def estimate_fine_tuning_job(
    request: Request,
    pool: SmallPoolDep,
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

    def estimated(check: Check) -> Response:
        resolver.check_base(body)
        with database.read() as tx:
            named = sources.load(tx, project, body)
        resolved = resolver.resolve(body, named)
        spec, tokenizer = resolved.spec, tokenizers.get(resolved.spec.base)

        def counts(file: StoredFile, of: int = 1) -> TokenCounts:
            rows = tokenised_rows(artifacts.file_rows(file.id), tokenizer, spec.hyperparameters, check)
            return count_tokens(rows, file.dataset["rows"], SAMPLED_ROWS // of)

        first, *further = (counts(file, len(named.training)) for file in named.training)
        training = sum(further, first)
        validation = counts(named.validation) if named.validation else None
        metadata = bases(spec.base)
        shape = metadata.shape if metadata else None
        with database.read() as tx:
            device = newest_device(tx)
            calibration = calibrate(tx, spec, device, shape)
        return json_response(estimate(spec, training, validation, calibration, resolved.warnings, shape, device))

    return await pool.run(request, estimated)
