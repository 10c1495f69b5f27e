"""The gateway's HTTP application, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.routing import APIRoute

from services.gateway import files, jobs
from services.gateway.services import open_services
from services.gateway.settings import GatewaySettings
from shared.web import RequestContext, install_error_handlers


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application; nothing is opened before it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with open_services(settings) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="Tunesmith gateway",
        version=version("tunesmith"),
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
    )
    install_error_handlers(app)
    app.add_middleware(RequestContext)
    app.include_router(files.uploads)
    app.include_router(files.router)
    app.include_router(jobs.router)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name
