"""Generation, passed on to inference: bodies are checked here, and names of models become ids.

Inference sees only what `shared.inference_api` allows, and of the client's headers only `Accept`.
"""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.http.azure_paths import deployment_of
from services.gateway.inference.forwarder import Forwarder
from services.gateway.inference.proxy import ProxyResponse
from services.gateway.models.store import Target
from services.gateway.routes.dependencies import ForwarderDep, Project, ReplicasDep
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, TGI_ERRORS
from shared.http.disconnect import while_connected
from shared.inference_api.administration import INFO, InfoJson
from shared.inference_api.documented import (
    CHAT_ANSWERS,
    COMPLETION_ANSWERS,
    TGI_ANSWERS,
    TGI_LIST_ANSWERS,
    TGI_STREAM,
)
from shared.inference_api.fields import MAX_MODEL_NAME
from shared.inference_api.ignored import IGNORED_PARAMETERS, take_ignored
from shared.inference_api.openai import (
    CHAT_COMPLETIONS,
    COMPLETIONS,
    NO_MODEL_IN_PARTICULAR,
    ChatCompletionBody,
    CompletionBody,
)
from shared.inference_api.tgi import COMPAT, GENERATE, GENERATE_STREAM, GenerateBody

CLIENT_GONE = 499


class GenerateRoute(AuthenticatedRoute):
    """Clients of text-generation-inference do not all call their JSON so."""

    always_json = True


router = APIRouter(route_class=GenerateRoute, tags=["generate"], dependencies=[NEEDS_KEY])


@router.post(GENERATE, responses={**TGI_ANSWERS, **TGI_ERRORS})
async def generate(body: GenerateBody, request: Request, forwarder: ForwarderDep, project: Project) -> Response:
    """Complete a text with a base or any adapter (`parameters.adapter_id`)."""
    return await _tgi(request, forwarder, project, body)


@router.post(GENERATE_STREAM, responses={**TGI_STREAM, **TGI_ERRORS})
async def generate_stream(body: GenerateBody, request: Request, forwarder: ForwarderDep, project: Project) -> Response:
    """The same as server-sent events."""
    return await _tgi(request, forwarder, project, body)


@router.post(COMPAT, responses={**TGI_LIST_ANSWERS, **TGI_ERRORS})
async def generate_compat(body: GenerateBody, request: Request, forwarder: ForwarderDep, project: Project) -> Response:
    """The same for clients that post to the bare URL; the answer is a list."""
    return await _tgi(request, forwarder, project, body)


@router.post(CHAT_COMPLETIONS, responses={**CHAT_ANSWERS, **OPENAI_ERRORS})
async def create_chat_completion(
    body: ChatCompletionBody, request: Request, forwarder: ForwarderDep, project: Project
) -> Response:
    """Answer a conversation with a base, an adapter or a checkpoint (`model`)."""
    return await _openai(request, forwarder, project, body)


@router.post(COMPLETIONS, responses={**COMPLETION_ANSWERS, **OPENAI_ERRORS})
async def create_completion(
    body: CompletionBody, request: Request, forwarder: ForwarderDep, project: Project
) -> Response:
    """Complete a prompt with a base, an adapter or a checkpoint (`model`)."""
    return await _openai(request, forwarder, project, body)


@router.get(INFO, responses=TGI_ERRORS)
async def info(
    forwarder: ForwarderDep,
    replicas: ReplicasDep,
    project: Project,
    model: Annotated[str, Query(max_length=MAX_MODEL_NAME)] = "",
) -> InfoJson:
    """What serves a model: base, revision, precision, limits; of the default base if none is named."""
    target = await forwarder.target(project, model, "model")
    return replicas.info(target.base)


async def _tgi(request: Request, forwarder: Forwarder, project: str, body: GenerateBody) -> Response:
    named = (body.parameters and body.parameters.adapter_id) or ""
    target = await forwarder.target(project, named, "parameters.adapter_id")
    if body.parameters and named:
        body.parameters.adapter_id = target.adapter
    return await _forwarded(request, forwarder, project, target, body, named)


async def _openai(
    request: Request, forwarder: Forwarder, project: str, body: ChatCompletionBody | CompletionBody
) -> Response:
    body.model = deployment_of(request) or body.model
    named = "" if body.model is None or body.model in NO_MODEL_IN_PARTICULAR else body.model
    target = await forwarder.target(project, named, "model")
    body.model = (target.adapter or target.base) if named else ""
    return await _forwarded(request, forwarder, project, target, body, named)


async def _forwarded(
    request: Request, forwarder: Forwarder, project: str, target: Target, body: BaseModel, named: str
) -> Response:
    ignored = take_ignored(body)
    sending = forwarder.send(
        project,
        target,
        request.scope["path"],
        body,
        name=named,
        accept=request.headers.get("accept", "*/*"),
        request_id=request.state.request_id,
    )
    try:
        upstream = await while_connected(request.receive, sending)
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    return ProxyResponse(upstream, {IGNORED_PARAMETERS: ",".join(ignored)} if ignored else {})
