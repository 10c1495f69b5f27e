"""Who is asking, and how much they may send: both decided before a body is read.

A custom route class, not a dependency (FastAPI reads the body first) and not middleware on paths (a path can be
disguised; a route that was matched cannot).
"""

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive

from services.gateway.http.keys import MAX_KEY_CHARACTERS, Keys
from shared.errors import PayloadTooLarge, Unauthenticated, UnsupportedMediaType

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class AuthenticatedRoute(APIRoute):
    """A route that needs a key, and whose body is read whole, up to `max_body_bytes`."""

    reads_body: ClassVar[bool] = True

    def get_route_handler(self) -> Handler:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            services = request.app.state.services
            await authenticate(request, services.keys)
            if request.headers.get("content-encoding", "identity").lower() != "identity":
                raise UnsupportedMediaType("compressed request bodies are not accepted")
            if self.reads_body:
                body = await read_bounded(request, services.settings.max_body_bytes)
                request = Request(request.scope, _replay(body, request.receive))
            return await inner(request)

        return handler


class StreamingRoute(AuthenticatedRoute):
    """A route that needs a key, and whose endpoint reads the body itself as it comes in."""

    reads_body = False


async def authenticate(request: Request, keys: Keys) -> None:
    """Find whose the request's bearer key is and leave it on `request.state.owner`.

    Raises:
        Unauthenticated: no key, a malformed header, or an unknown or revoked key.
    """
    headers = request.headers.getlist("authorization")
    scheme, _, key = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise Unauthenticated("send your API key as 'Authorization: Bearer ts-…'")
    owner = await run_in_threadpool(keys.owner_of, key) if len(key) <= MAX_KEY_CHARACTERS else None
    if owner is None:
        raise Unauthenticated("this API key is not valid")
    request.state.owner = owner


async def read_bounded(request: Request, limit: int) -> bytes:
    """The body, read while it stays within `limit` bytes.

    Raises:
        PayloadTooLarge: it does not, or says that it will not.
    """
    check_declared_length(request, limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise PayloadTooLarge(f"the body is larger than {limit} bytes")
    return bytes(body)


def check_declared_length(request: Request, limit: int) -> None:
    """Refuse by `Content-Length` alone.

    Raises:
        PayloadTooLarge: more than `limit` bytes are announced.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:19]) > limit:
        raise PayloadTooLarge(f"the body is larger than {limit} bytes")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that gives `body` once and then whatever the client does next (its disconnect)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
