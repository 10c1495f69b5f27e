"""HEAD is GET without a body, and ends at once what GET would go on with."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from starlette.middleware import Middleware

from shared.http.event_stream import EventStreamResponse
from shared.http.head import HeadAsGet
from shared.http.web import RequestContext, install_error_handlers
from tests.services.gateway.conftest import served


@pytest.fixture
def seen() -> list[tuple[str, str, int]]:
    return []


@pytest.fixture
def ended() -> list[str]:
    return []


@pytest.fixture
def app(seen: list[tuple[str, str, int]], ended: list[str]) -> FastAPI:
    def observe(method: str, route: str, status: int, seconds: float) -> None:
        seen.append((method, route, status))

    app = FastAPI(middleware=[Middleware(RequestContext, observe=observe), Middleware(HeadAsGet)])
    install_error_handlers(app)

    async def endless() -> AsyncIterator[str]:
        try:
            while True:
                yield "data"
                await asyncio.sleep(0.01)
        finally:
            ended.append("events")

    async def close() -> None:
        ended.append("closed")

    @app.get("/v1/things/{thing}")
    async def thing(thing: str) -> Response:
        return Response(thing * 1000, headers={"x-thing": thing})

    @app.get("/v1/stream")
    async def stream() -> Response:
        return StreamingResponse(endless(), media_type="text/event-stream")

    @app.get("/v1/events")
    async def events() -> Response:
        return EventStreamResponse(endless(), close, {})

    @app.post("/v1/only")
    async def only() -> None:
        return None

    return app


def test_head_is_get_without_a_body(app: FastAPI, seen: list[Any]) -> None:
    with served(app) as url, httpx.Client(base_url=url) as http:
        whole, head = http.get("/v1/things/a"), http.head("/v1/things/a")
        assert (head.status_code, head.content) == (200, b"")
        varying = {"date", "x-request-id"}
        assert {k: v for k, v in head.headers.items() if k not in varying} == {
            k: v for k, v in whole.headers.items() if k not in varying
        }
        assert head.headers["content-length"] == "1000"
        # The connection is in order for the next request.
        assert http.get("/v1/things/b").text == "b" * 1000
        refused = http.head("/v1/only")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert http.put("/v1/things/a").headers["allow"] == "GET, HEAD"
        assert http.head("/v1/none").status_code == 404
    assert seen[1] == ("HEAD", "/v1/things/{thing}", 200)


def test_a_stream_that_would_go_on_ends_with_its_head(app: FastAPI, ended: list[str]) -> None:
    with served(app) as url, httpx.Client(base_url=url) as http:
        for path in ("/v1/stream", "/v1/events"):
            head = http.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"].startswith("text/event-stream")
            assert http.get("/v1/things/a").is_success
    assert "closed" in ended
