"""What a route refuses before its body is read, and that a body is passed on whole."""

import asyncio
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from starlette.types import Message

from shared.errors import Unauthenticated
from shared.http.bounded_route import BoundedRoute, bearer_token
from shared.http.web import install_error_handlers

LIMIT = 1000


class Route(BoundedRoute):
    always_json = True

    async def authorise(self, request: Request) -> None:
        if bearer_token(request) != "key":
            raise Unauthenticated("no")

    def body_limit(self, request: Request) -> int | None:
        return LIMIT


def application() -> FastAPI:
    app, router = FastAPI(), APIRouter(route_class=Route)

    @router.post("/v1/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    app.include_router(router)
    install_error_handlers(app)
    return app


def post(headers: list[tuple[str, str]], *chunks: bytes) -> tuple[int, int]:
    """(status, how many chunks were taken) of a request."""
    sent: list[Message] = []
    taken = 0

    async def receive() -> Message:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": taken < len(chunks)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/echo",
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }
    asyncio.run(application()(scope, receive, send))
    return sent[0]["status"], taken


KEY = ("authorization", "Bearer key")
FORM = ("content-type", "application/x-www-form-urlencoded")


@pytest.mark.parametrize(
    ("headers", "chunks", "status", "taken"),
    [
        ([KEY], [b'{"a": ', b"1}"], 200, 2),
        ([KEY, FORM], [b'{"a": 1}'], 200, 1),
        ([KEY, FORM], [b"a=1"], 400, 1),
        ([], [b"{}"], 401, 0),
        ([KEY, KEY], [b"{}"], 401, 0),
        ([("authorization", "Basic key")], [b"{}"], 401, 0),
        ([KEY, ("content-encoding", "gzip")], [b"{}"], 415, 0),
        ([KEY, ("content-length", "1001")], [b"{}"], 413, 0),
        ([KEY, ("content-length", "9" * 5000)], [b"{}"], 413, 0),
        ([KEY, ("content-length", "\xb2")], [b"{}"], 200, 1),
        ([KEY], [b" " * 600] * 9, 413, 2),
    ],
)
def test_a_request_is_judged_before_its_body_is_read(
    headers: list[tuple[str, str]], chunks: list[bytes], status: int, taken: int
) -> None:
    assert post(headers, *chunks) == (status, taken)
