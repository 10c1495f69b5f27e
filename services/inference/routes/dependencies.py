"""What endpoints ask for by type. All of it async, so that none takes a hop through the thread pool."""

from typing import Annotated

import structlog
from fastapi import Depends, Header, Request

from services.inference.serving import Serving
from services.inference.settings import InferenceSettings
from shared.inference_api.fields import MAX_MODEL_NAME
from shared.inference_api.headers import MODEL_NAME, PROJECT_TAG, PROJECT_TAG_PATTERN


async def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


async def _settings(request: Request) -> InferenceSettings:
    settings: InferenceSettings = request.app.state.settings
    return settings


async def _project_tag(
    tag: Annotated[
        str, Header(alias=PROJECT_TAG, pattern=PROJECT_TAG_PATTERN, description="Opaque; set by the gateway.")
    ] = "",
) -> str:
    if tag:
        # Into every log line of this request.
        structlog.contextvars.bind_contextvars(project_tag=tag)
    return tag


ServingDep = Annotated[Serving, Depends(_serving)]
SettingsDep = Annotated[InferenceSettings, Depends(_settings)]
ProjectTag = Annotated[str, Depends(_project_tag)]
# The name that OpenAI's answers repeat.
ClientsModelName = Annotated[
    str, Header(alias=MODEL_NAME, max_length=MAX_MODEL_NAME, description="What the gateway's client called the model.")
]
