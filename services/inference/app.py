"""The HTTP application: its routes, who may call them, how errors look. Imports no torch.

The model is loaded when the application starts (`build`), so that the OpenAPI document needs none.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware

from services.inference.metrics import Metrics
from services.inference.routes.adapters import adapters_router
from services.inference.routes.internal_route import internal_route
from services.inference.routes.openai import openai_router
from services.inference.routes.operations import health, operations_router
from services.inference.routes.tgi import tgi_router
from services.inference.serving import Serving
from services.inference.settings import InferenceSettings
from shared.http.error_bodies import OPENAI_ERRORS, TGI_ERRORS
from shared.http.head import HeadAsGet
from shared.http.web import RequestContext, install_error_handlers


def create_app(settings: InferenceSettings, build: Callable[[], Serving]) -> FastAPI:
    """The application.

    Args:
        build: loads the base and starts the engine; called in a thread when the application starts.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # In a thread that ends afterwards: libgomp lets threads spin only while a process has no more of them than
        # cores, and the threads that helped to load would count for ever.
        with ThreadPoolExecutor(1, thread_name_prefix="build") as pool:
            serving = await asyncio.get_running_loop().run_in_executor(pool, copy_context().run, build)
        serving.observe(metrics)
        metrics.watch(serving)
        app.state.serving = serving
        try:
            yield
        finally:
            await serving.close()

    app = FastAPI(
        title="Tunesmith inference",
        version=version("tunesmith"),
        summary="Private API: generates with one base model and any of its adapters.",
        lifespan=lifespan,
        # Every gateway asks for /info every other second.
        middleware=[
            Middleware(RequestContext, observe=metrics.answered, unlogged=("/health", "/metrics", "/info")),
            Middleware(HeadAsGet),
        ],
        docs_url=None,
        redoc_url=None,
    )
    app.state.metrics, app.state.settings = metrics, settings
    route_class = internal_route(settings.internal_token.get_secret_value(), settings.body_bytes)
    app.include_router(health, responses=TGI_ERRORS)
    # For the API document only: the route class has refused requests without the token before this runs.
    token = Depends(HTTPBearer(auto_error=False, scheme_name="token", description="TUNESMITH_INTERNAL_TOKEN"))
    for router, errors in (
        (tgi_router(route_class), TGI_ERRORS),
        (openai_router(route_class), OPENAI_ERRORS),
        (adapters_router(route_class), TGI_ERRORS),
        (operations_router(route_class), TGI_ERRORS),
    ):
        app.include_router(router, responses=errors, dependencies=[token])
    install_error_handlers(app)
    return app


def openapi_document() -> dict[str, Any]:
    """The API's description; needs no model and no torch."""

    def never() -> Serving:
        raise RuntimeError("this application only describes itself")

    return create_app(InferenceSettings(host="127.0.0.1"), never).openapi()
