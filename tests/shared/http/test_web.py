"""Errors in the dialect of their path, ids on every answer, and nothing of the inside told."""

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import pytest
import structlog
from fastapi import Body, FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware import Middleware

from shared.errors import InvalidDataset, InvalidRequest, NotFound, Overloaded, TunesmithError, Unavailable
from shared.http.web import RequestContext, install_error_handlers


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    number: float = Field(ge=0, le=1)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str
    inner: Inner | None = None
    parts: Annotated[str, Field(max_length=9)] | list[Inner] | None = None
    stop: Annotated[str, Field(max_length=9)] | Annotated[list[str], Field(max_length=2)] | None = None


ERRORS: dict[str, Exception] = {
    "invalid": InvalidRequest("n_epochs must be positive", param="n_epochs"),
    "dataset": InvalidDataset("bad rows", [{"line": 3, "path": "", "code": "blank", "message": "blank"}], 7),
    "missing": NotFound("no such thing"),
    "full": Overloaded("full", retry_after=7),
    "away": Unavailable("away"),
    "ours": TunesmithError("a reason we give"),
    "bug": RuntimeError("secret of the inside"),
}


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """What is logged, caught before it is made pretty."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def seen() -> list[tuple[str, str, int]]:
    return []


@pytest.fixture
def app(seen: list[tuple[str, str, int]]) -> FastAPI:
    def observe(method: str, route: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        seen.append((method, route, status))

    app = FastAPI(middleware=[Middleware(RequestContext, observe=observe)])
    install_error_handlers(app)

    @app.get("/health/raise/{name}")
    @app.get("/v1/raise/{name}")
    async def fail(name: str) -> None:
        raise ERRORS[name]

    @app.post("/health/echo")
    @app.post("/v1/echo")
    async def echo(body: Annotated[Outer, Body()]) -> Outer:
        return body

    return app


def call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("name", "status", "tgi_status"),
    [("invalid", 400, 422), ("dataset", 400, 422), ("missing", 404, 404), ("full", 429, 429), ("away", 503, 503),
     ("ours", 500, 500), ("bug", 500, 500)],
)  # fmt: skip
def test_each_path_speaks_its_dialect(app: FastAPI, name: str, status: int, tgi_status: int) -> None:
    openai, tgi = call(app, "GET", f"/v1/raise/{name}"), call(app, "GET", f"/health/raise/{name}")
    assert (openai.status_code, tgi.status_code) == (status, tgi_status)
    assert set(openai.json()["error"]) >= {"message", "type", "param", "code"}
    assert isinstance(tgi.json()["error"], str)
    assert "error_type" in tgi.json()
    for answer in (openai, tgi):
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
        assert answer.headers["x-request-id"]


def test_details_and_retry_after(app: FastAPI) -> None:
    body = call(app, "GET", "/v1/raise/dataset").json()["error"]
    assert (body["error_count"], body["errors"][0]["line"]) == (7, 3)
    for path in ("/health/raise/full", "/v1/raise/full"):
        assert call(app, "GET", path).headers["retry-after"] == "7"
    assert call(app, "GET", "/health/raise/invalid").json()["error"] == "n_epochs must be positive"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"", "required"),
        (b"{}", "text"),
        (b'{"text": 1}', "text"),
        (b'{"text": "a", "more": 1}', "unknown field 'more'"),
        (b'{"text": "a", "inner": {"number": 7}}', "inner.number"),
        (b'{"text": "a", "inner": {"number": NaN}}', "inner.number"),
        (b'{"text": "a", "inner": {"number": 0, "deep": 1}}', "inner.deep"),
        (b"[" * 100_000, "body"),
        (b'{"text": "a", "text ": 1}', "unknown field 'text '"),
        (b'{"text": "a", "str": 1, "int": 2}', "unknown field 'str'"),
        (b'{"text": "a", "inner": {"number": 0, "int": 1}}', "unknown field 'inner.int'"),
        (b'{"text": "a", "inner": {"number": 0, "b\xc3\xa4d": 1}}', "in 'inner'"),
        (b'{"text": "a", "parts": [{"number": 0, "deep": 1}]}', "parts.0.deep"),
        (b'{"text": "a", "stop": ["b", "c", "d"]}', "stop: List should have at most 2"),
        (b'{"text": "a", "inner": {"number": ' + b"9" * 5000 + b"}}", "cannot be read as JSON"),
    ],
)
def test_bad_bodies_name_the_field_and_never_echo(app: FastAPI, body: bytes, words: str) -> None:
    for path, status in (("/health/echo", 422), ("/v1/echo", 400)):
        answer = call(app, "POST", path, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code <= status
        assert "detail" not in answer.json()
        assert words in answer.text
        assert "constrained" not in answer.text


def test_unknown_paths_and_methods(app: FastAPI) -> None:
    for path in ("/v1/none", "/none"):
        assert call(app, "GET", path).json()["error"]["code"] == "not_found"
        assert call(app, "GET", path).status_code == 404
    assert "error_type" in call(app, "GET", "/health/none").json()
    wrong = call(app, "GET", "/health/echo")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123_x.y:z", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("a b", False),
        ("ä", False),
        ('a"', False),
    ],
)
def test_harmless_request_ids_are_kept(app: FastAPI, given: str, kept: bool) -> None:
    answer = call(app, "GET", "/health/raise/missing", headers={"x-request-id": given.encode("latin-1")})
    assert (answer.headers["x-request-id"] == given) == kept
    assert answer.headers["x-request-id"]


def test_answers_are_observed_by_route_template(app: FastAPI, seen: list[tuple[str, str, int]]) -> None:
    call(app, "GET", "/health/raise/missing")
    call(app, "GET", "/nowhere/at/all")
    call(app, "GET", "/health/raise/bug")
    assert seen == [
        ("GET", "/health/raise/{name}", 404),
        ("GET", "unmatched", 404),
        ("GET", "/health/raise/{name}", 500),
    ]


def test_a_bug_is_logged_with_its_trace(app: FastAPI, logs: list[Any]) -> None:
    assert call(app, "GET", "/health/raise/bug").json() == {"error": "internal error", "error_type": "generation"}
    (entry,) = [entry for entry in logs if entry["event"] == "unexpected error"]
    assert entry["exc_info"] is ERRORS["bug"]


def test_a_method_of_any_name_makes_no_series_and_no_log(
    app: FastAPI, seen: list[tuple[str, str, int]], logs: list[Any]
) -> None:
    assert call(app, "SECRET-WORD", "/health/raise/ours").status_code == 405
    assert seen == [("other", "/health/raise/{name}", 405)]
    assert "SECRET" not in str([entry for entry in logs if entry["event"] == "request"])
