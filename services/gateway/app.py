"""The gateway's HTTP application, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.routing import APIRoute

from services.gateway import files, generate, jobs, models, operations
from services.gateway.metrics import Metrics
from services.gateway.services import open_services
from services.gateway.settings import GatewaySettings
from services.gateway.unread import CloseUnread
from shared.web import RequestContext, install_error_handlers


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application; nothing is opened before it starts."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, metrics) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="Tunesmith gateway",
        version=version("tunesmith"),
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
    )
    install_error_handlers(app)
    # The last one added sees a request first.
    app.add_middleware(CloseUnread)
    app.add_middleware(RequestContext, observe=metrics.answered)
    for part in (files.uploads, files.router, jobs.router, models.router, generate.router):
        app.include_router(part)
    app.include_router(operations.health)
    app.include_router(operations.router)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name
