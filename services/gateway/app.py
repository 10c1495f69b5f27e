"""The gateway's HTTP application, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware.cors import CORSMiddleware

from services.gateway.http.azure_paths import AzurePaths
from services.gateway.http.body_backpressure import CloseOnUnreadBody
from services.gateway.metrics import Metrics
from services.gateway.routes import (
    estimates,
    file_preview,
    files,
    front_page,
    generate,
    job_metrics,
    jobs,
    model_responses,
    models,
    operations,
)
from services.gateway.services import open_services
from services.gateway.settings import GatewaySettings
from shared.bases.catalogue import Catalogue
from shared.errors import Unavailable
from shared.http.head import HeadAsGet
from shared.http.web import RequestContext, error_response, install_error_handlers
from shared.logs import get_logger
from shared.storage.outages import is_away, is_full


def create_app(settings: GatewaySettings, catalogue: Catalogue) -> FastAPI:
    """The application; nothing is opened before it starts."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, catalogue, metrics) as services:
            app.state.services = services
            yield

    # FastAPI's own page loads its script from a CDN: of no use without the internet, and people paste keys there.
    app = FastAPIOffline(
        redoc_url=None,
        title="Tunesmith gateway",
        version=version("tunesmith"),
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
    )
    install_error_handlers(app)
    app.add_exception_handler(SQLAlchemyError, _database_failed)
    # The last one added sees a request first.
    app.add_middleware(AzurePaths)
    app.add_middleware(HeadAsGet)
    app.add_middleware(CloseOnUnreadBody)
    if settings.cors_origins:
        # Without credentials: a key is sent by the page itself, and no cookie of ours means anything.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("*",),
        )
    app.add_middleware(RequestContext, observe=metrics.answered)
    parts = (files.uploads, files.router, file_preview.router, jobs.router, job_metrics.router, estimates.router)
    for part in (*parts, models.router, generate.router, model_responses.router):
        app.include_router(part)
    app.include_router(front_page.router)
    app.include_router(operations.health)
    app.include_router(operations.router)
    return app


async def _database_failed(request: Request, error: Exception) -> JSONResponse:
    if not is_away(error):
        raise error
    if is_full(error):
        get_logger("database").error("the database's disk is full", error=str(error))
        away = Unavailable("the disk of the database is full; nothing was changed", code="storage_full")
    else:
        get_logger("database").error("the database does not answer", error=str(error))
        away = Unavailable("the database does not answer", code="database_unavailable")
    return error_response(away, request.scope["path"])


def _operation_id(route: APIRoute) -> str:
    return route.name
