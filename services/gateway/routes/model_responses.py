"""`/v1/responses`: OpenAI's Responses API, text and functions, over chat completions; answers are kept for a time."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from services.gateway.responses.chat_request import chat_request, renamed
from services.gateway.responses.conversation import Chat, calls_in, joined, message_of
from services.gateway.responses.draft import ResponseDraft
from services.gateway.responses.request_schema import ResponseBody
from services.gateway.responses.store import ResponseStore, fits
from services.gateway.routes.dependencies import DatabaseDep, ForwarderDep, Project, ResponseId, ResponsesDep
from services.gateway.routes.generate import CLIENT_GONE, GenerateRoute
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS
from shared.errors import InvalidRequest, NotFound
from shared.http.disconnect import while_connected
from shared.http.event_stream import DONE, MEDIA_TYPE, EventStreamResponse
from shared.inference_api.ignored import IGNORED_PARAMETERS, take_ignored
from shared.inference_api.openai import CHAT_COMPLETIONS, NO_MODEL_IN_PARTICULAR
from shared.storage.database import Database

router = APIRouter(route_class=GenerateRoute, tags=["generate"], dependencies=[NEEDS_KEY], responses=OPENAI_ERRORS)
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "A response; with `stream` the events of its making.", "content": {MEDIA_TYPE: {}}}
}


@router.post("/v1/responses", responses=_STREAM)
async def create_response(
    body: ResponseBody,
    request: Request,
    forwarder: ForwarderDep,
    database: DatabaseDep,
    store: ResponsesDep,
    project: Project,
) -> Response:
    """Answer a text or a conversation with a base, an adapter or a checkpoint (`model`)."""
    messages = await run_in_threadpool(_messages, database, store, project, body)
    draft = ResponseDraft(body, messages, kept=body.store is not False)
    ignored = take_ignored(body)
    chat = chat_request(body, messages)
    name = "" if chat.model is None or chat.model in NO_MODEL_IN_PARTICULAR else chat.model
    target = await forwarder.target(project, name, "model")
    chat.model = (target.adapter or target.base) if name else ""
    sending = forwarder.send(
        project, target, CHAT_COMPLETIONS, chat, name=name, accept="*/*", request_id=request.state.request_id
    )

    def keep() -> None:
        items = draft.items()
        draft.kept = draft.kept and fits(items)
        if draft.kept:
            with database.write() as tx:
                store.keep(tx, project, draft.id, items)

    try:
        upstream = await while_connected(request.receive, sending)
        ignored += [renamed(name) or "" for name in upstream.headers.get(IGNORED_PARAMETERS, "").split(",") if name]
        headers = {IGNORED_PARAMETERS: ",".join(ignored)} if ignored else {}
        if upstream.status_code == 200 and body.stream:
            return EventStreamResponse(_events(upstream, draft, keep), upstream.aclose, headers, named=True)
        try:
            content = json.loads(await while_connected(request.receive, upstream.aread()))
        finally:
            await upstream.aclose()
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    if upstream.status_code != 200:
        content["error"]["param"] = renamed(content["error"].get("param"))
        passed = {name: upstream.headers[name] for name in ("retry-after",) if name in upstream.headers}
        return JSONResponse(content, upstream.status_code, passed)
    draft.take(content)
    draft.finish()
    await run_in_threadpool(keep)
    return JSONResponse(draft.response(), headers=headers)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    database: DatabaseDep, store: ResponsesDep, project: Project, response_id: ResponseId
) -> Response:
    """A response that is still kept."""

    def found() -> Any:
        with database.read() as tx:
            return _kept(store.find(tx, project, response_id, "response_id"), response_id)["response"]

    return JSONResponse(await run_in_threadpool(found))


@router.delete("/v1/responses/{response_id}")
async def delete_response(
    database: DatabaseDep, store: ResponsesDep, project: Project, response_id: ResponseId
) -> Response:
    """Forget a response and what it has written."""

    def forget() -> None:
        with database.write() as tx:
            _kept(store.find(tx, project, response_id, "response_id"), response_id)
            store.delete(tx, project, response_id)

    await run_in_threadpool(forget)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _kept(row: dict[str, Any], response_id: str) -> dict[str, Any]:
    if "response" not in row:
        raise NotFound(f"nothing is kept under the id {response_id}", param="response_id")
    return row


def _messages(database: Database, store: ResponseStore, project: str, body: ResponseBody) -> Chat:
    """The conversation that is to be answered: what was kept of earlier responses, and what the request adds."""
    found: Chat = []
    with database.read() as tx:
        if body.previous_response_id:
            earlier = store.find(tx, project, body.previous_response_id, "previous_response_id")
            if "response" not in earlier:
                raise NotFound(f"{body.previous_response_id} is no response", param="previous_response_id")
            found += earlier["messages"]
        if isinstance(body.input, str):
            return [*found, {"role": "user", "content": body.input}]
        calls = set(calls_in(found))
        for place, item in enumerate(body.input):
            if item.kind == "reasoning":
                continue
            if item.kind == "function_call_output" and item.call_id not in calls:
                param = f"input.{place}.call_id"
                raise InvalidRequest(f"{param}: no call before it has the id {item.call_id}", param=param)
            kept = item.kind == "item_reference"
            added = (
                store.find(tx, project, item.id or "", f"input.{place}.id")["messages"] if kept else [message_of(item)]
            )
            calls.update(calls_in(added))
            found += added
    if not found or found[-1]["role"] == "assistant":
        raise InvalidRequest("the last item of input must not be the assistant's", param="input")
    return joined(found)


async def _events(upstream: httpx.Response, draft: ResponseDraft, keep: Callable[[], None]) -> AsyncIterator[str]:
    for event in draft.beginning():
        yield event
    try:
        async for line in upstream.aiter_lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if not data or data == DONE:
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                yield draft.failed(chunk["error"])
                return
            for event in draft.take(chunk):
                yield event
    except httpx.HTTPError:
        yield draft.failed({"message": "inference broke off the answer"})
        return
    for event in draft.finish():
        yield event
    # What the last event names can be asked for.
    await run_in_threadpool(keep)
    yield draft.end()
