"""Generation, passed on to inference: names become adapter ids, the rest of a body goes as it came.

What a body may say is inference's affair; here it is read only as far as it names a model.
"""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.inference.proxy import Relay
from services.gateway.models.store import Target
from services.gateway.routes.dependencies import Project, Using
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, TGI_ERRORS
from services.gateway.services import Services
from shared.bases.catalogue import NO_MODEL_IN_PARTICULAR
from shared.errors import InvalidRequest, NotFound, Unavailable
from shared.http.disconnect import while_connected

router = APIRouter(route_class=AuthenticatedRoute, tags=["generate"], dependencies=[NEEDS_KEY])
CLIENT_GONE = 499

_Names = dict[Any, Any]


def _documented(description: str, required: str, properties: _Names, errors: _Names) -> _Names:
    schema = {"type": "object", "properties": properties, "required": [required] if required else []}
    content = {"application/json": {"schema": schema}}
    answer = {"content": {"application/json": {"schema": {}}, "text/event-stream": {}}, "description": description}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: answer, **errors},
    }


_TGI = _documented(
    "text-generation-inference's answer; server-sent events if streamed",
    "",
    {
        "inputs": {"type": "string"},
        "instruction": {"type": "string"},
        "input": {"type": "string"},
        "messages": {"type": "array", "items": {"type": "object"}},
        "parameters": {"type": "object", "properties": {"adapter_id": {"type": "string"}}},
        "stream": {"type": "boolean"},
    },
    TGI_ERRORS,
)
_CHAT = _documented(
    "OpenAI's chat completion; server-sent events if streamed",
    "messages",
    {"model": {"type": "string"}, "messages": {"type": "array", "items": {"type": "object"}}},
    OPENAI_ERRORS,
)
_COMPLETION = _documented(
    "OpenAI's completion; server-sent events if streamed",
    "prompt",
    {"model": {"type": "string"}, "prompt": {}},
    OPENAI_ERRORS,
)


@router.post("/generate", **_TGI)
async def generate(request: Request, services: Using, project: Project) -> Response:
    """Complete a text with a base or any adapter (`parameters.adapter_id`)."""
    return await _tgi(request, services, project)


@router.post("/generate_stream", **_TGI)
async def generate_stream(request: Request, services: Using, project: Project) -> Response:
    """The same as server-sent events."""
    return await _tgi(request, services, project)


@router.post("/", **_TGI)
async def generate_compat(request: Request, services: Using, project: Project) -> Response:
    """The same for clients that post to the bare URL; the answer is a list."""
    return await _tgi(request, services, project)


@router.post("/v1/chat/completions", **_CHAT)
async def create_chat_completion(request: Request, services: Using, project: Project) -> Response:
    """Answer a conversation with a base, an adapter or a checkpoint (`model`)."""
    return await _openai(request, services, project)


@router.post("/v1/completions", **_COMPLETION)
async def create_completion(request: Request, services: Using, project: Project) -> Response:
    """Complete a prompt with a base, an adapter or a checkpoint (`model`)."""
    return await _openai(request, services, project)


@router.get("/info", responses=TGI_ERRORS)
async def info(services: Using, project: Project, model: Annotated[str, Query(max_length=256)] = "") -> dict[str, Any]:
    """What serves a model: base, revision, precision, limits; of the default base if none is named."""
    target = await _target(services, project, model, "model")
    return services.replicas.info(target.base)


async def _tgi(request: Request, services: Services, project: str) -> Response:
    body = _object(await request.body())
    parameters = body.get("parameters")
    named = parameters.get("adapter_id") if isinstance(parameters, dict) else None
    target = await _target(services, project, named, "parameters.adapter_id")
    # What is no string stays as it is, for inference to refuse; the base must not answer instead.
    if isinstance(parameters, dict) and isinstance(named, str) and named and named != target.adapter:
        parameters["adapter_id"] = target.adapter
    return await _passed_on(request, services, target, body, named)


async def _openai(request: Request, services: Services, project: str) -> Response:
    body = _object(await request.body())
    named = body.get("model")
    if isinstance(named, str) and named in NO_MODEL_IN_PARTICULAR:
        named = body["model"] = ""
    target = await _target(services, project, named, "model")
    if isinstance(named, str) and named:
        body["model"] = target.adapter or target.base
    return await _passed_on(request, services, target, body, named)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body


async def _target(services: Services, project: str, named: object, param: str) -> Target:
    """What is asked for.

    Raises:
        NotFound: there is no such model; never the base instead.
        Unavailable: nothing is named, and nothing is served.
    """
    if isinstance(named, str) and named:
        try:
            return await run_in_threadpool(_resolve, services, project, named)
        except NotFound as error:
            error.param = param
            raise
    # Unsaid, or of a type that inference refuses by name.
    default = services.settings.default_base
    if default:
        return Target(services.catalogue.get(default).id)
    served = services.replicas.served()
    if not served:
        raise Unavailable("no inference process answers", code="base_not_served")
    return Target(served[0])


def _resolve(services: Services, project: str, name: str) -> Target:
    with services.database.read() as tx:
        return services.models.resolve(tx, project, name)


async def _passed_on(
    request: Request, services: Services, target: Target, body: dict[str, Any], named: object
) -> Response:
    headers = {
        "content-type": "application/json",
        "accept": request.headers.get("accept", "*/*"),
        "x-request-id": request.state.request_id,
    }
    if isinstance(named, str) and named:
        # OpenAI's answers name the model as the client did.
        headers["x-model-name"] = named
    try:
        raw = json.dumps(body).encode()
        work = services.replicas.send(target, request.scope["path"], raw, headers)
        return Relay(await while_connected(request.receive, work))
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
