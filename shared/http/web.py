"""What both HTTP services share: error answers, the request id, and one access line per request.

TGI's own paths answer its `{"error", "error_type"}`, every other path OpenAI's `{"error": {...}}`; FastAPI's
`{"detail"}` and stack traces are never sent. Pure ASGI only: Starlette's BaseHTTPMiddleware hides that a client has
left.
"""

import json
import re
import secrets
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.errors import InvalidRequest, NotFound, Overloaded, TunesmithError, Unauthenticated
from shared.http.unbuilt_paths import hint
from shared.http.validation import validation_error
from shared.logs import get_logger

# How long a connection may stay open unused between two requests, in seconds. Whoever closes first must be the client:
# a request that it sends just as the server closes is lost without an answer, and a POST is not repeated. Clients and
# balancers keep connections for 4 s (undici), 5 s (httpx, and so OpenAI's SDK) or 60 s (nginx, AWS); uvicorn's own
# default is 5 s.
IDLE_CONNECTION_SECONDS = 75

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
# text-generation-inference's paths, and what an operator asks of a process like it.
_TGI_PATH = re.compile(r"/|/(generate|generate_stream|info)|/metrics(/inference)?|/(health|adapters)(/.*)?")
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# FastAPI's words for a body that is neither JSON nor wrong JSON.
_READABLE = {"There was an error parsing the body": "the body cannot be read as JSON; is a number in it far too long?"}
_TGI_TYPES = {400: "validation", 404: "validation", 413: "validation", 422: "validation", 429: "overloaded"}
_TGI_TYPES |= {401: "authentication", 503: "unavailable"}


def error_body(error: TunesmithError, path: str) -> dict[str, Any]:
    """The body for an error on `path`, in the dialect of that path."""
    if not _TGI_PATH.fullmatch(path):
        fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        return {"error": fields | error.details()}
    where = f"{error.param}: " if error.param and error.param not in error.message else ""
    kind = _TGI_TYPES.get(error.status, "generation")
    return {"error": where + error.message, "error_type": kind} | error.details()


def error_json(error: TunesmithError, path: str) -> str:
    """The same as JSON in one line, for a stream whose status is out already."""
    return json.dumps(error_body(error, path))


def error_response(error: TunesmithError, path: str) -> JSONResponse:
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    # TGI's clients know 422 as the caller's fault; OpenAI's know 400.
    status = 422 if type(error).status == 400 and _TGI_PATH.fullmatch(path) else error.status
    return JSONResponse(error_body(error, path), status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every expected failure of `app` in our own shapes; `RequestContext` answers the unexpected ones."""
    log = get_logger("http")

    async def on_tunesmith(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TunesmithError)
        if error.status >= 500:
            log.error("request failed", code=error.code, error=error.message)
        return error_response(error, request.scope["path"])

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(validation_error(error), request.scope["path"])

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        problem: TunesmithError
        phrase = HTTPStatus(error.status_code).phrase.lower()
        if error.status_code == 400:
            # A body that is no JSON at all; its status follows the dialect like that of any other bad body.
            problem = InvalidRequest(_READABLE.get(error.detail, error.detail), code="bad_request")
            return error_response(problem, request.scope["path"])
        if error.status_code == 404:
            path = request.scope["path"]
            instead = hint(path)
            problem = NotFound(f"no such path: {request.method} {path[:200]}" + (f"; {instead}" if instead else ""))
        else:
            problem = InvalidRequest(phrase, code=phrase.replace(" ", "_"))
        body = error_body(problem, request.scope["path"])
        # Starlette names the methods of one route only; a path may have several.
        headers = {"allow": ", ".join(_methods(request))} if error.status_code == 405 else error.headers
        return JSONResponse(body, error.status_code, headers)

    async def on_gone(request: Request, error: Exception) -> Response:
        # The client left before its answer. The status is nginx's for that; only the access log sees it.
        return Response(status_code=499)

    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(TunesmithError, on_tunesmith)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


def _methods(request: Request) -> list[str]:
    scope = {"type": "http", "path": request.scope["path"], "root_path": request.scope.get("root_path", "")}
    found = {
        method
        for method in _METHODS
        if any(route.matches(scope | {"method": method})[0] is Match.FULL for route in request.app.routes)
    }
    # See `shared.http.head`.
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


class RequestContext:
    """ASGI middleware: a request id on the answer and in every log line, one access line, and unexpected errors.

    An id that the caller sends is kept if it is harmless, so that one id follows a request across services. An
    unexpected error is logged with its trace and answered with a bare 500, which has the request id too.

    Args:
        observe: called with (method, route template, status, seconds) when an answer has been sent.
        unlogged: beginnings of route templates that get no access line, since something asks for them all the time.
    """

    def __init__(
        self,
        app: ASGIApp,
        observe: Callable[[str, str, int, float], None] | None = None,
        unlogged: tuple[str, ...] = ("/health", "/metrics"),
    ) -> None:
        self._app = app
        self._observe = observe
        self._unlogged = unlogged
        self._log = get_logger("http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        # A client can send any word here: each would be a new time series, and may be a secret in the log.
        method = scope["method"] if scope["method"] in _METHODS else "other"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                self._log.error("unexpected error", exc_info=error)
                if status:
                    # Half the answer has been sent; only closing the connection tells the client.
                    raise
                body = error_body(TunesmithError("internal error"), scope["path"])
                await JSONResponse(body, 500)(scope, receive, send_with_id)
            finally:
                seconds = time.perf_counter() - started
                route = getattr(scope.get("route"), "path", "unmatched")
                if self._observe:
                    self._observe(method, route, status, seconds)
                if not route.startswith(self._unlogged):
                    self._log.info(
                        "request",
                        method=method,
                        path=scope["path"][:200],
                        status=status,
                        ms=round(seconds * 1e3, 1),
                    )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode("latin-1"))
    return "req-" + secrets.token_hex(12)
