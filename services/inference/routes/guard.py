"""What acts before a request body is read: the bearer token and the size limit. A route class, not a dependency:
FastAPI reads the body before dependencies run.
"""

import hmac
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message

from shared.errors import PayloadTooLarge, Unauthenticated

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def guarded(token: str, body_bytes: int) -> type[APIRoute]:
    """A route class whose routes need `Authorization: Bearer <token>` (none if empty) and bound their bodies."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()

            async def guard(request: Request) -> Response:
                if token:
                    _authenticate(request, token)
                return await handler(await _bounded(request, body_bytes))

            return guard

    return GuardedRoute


def _authenticate(request: Request, token: str) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise Unauthenticated("this server needs its bearer token")


async def _bounded(request: Request, limit: int) -> Request:
    """The request with its body read, at most `limit` bytes of it.

    Raises:
        PayloadTooLarge: the body is larger; no more than `limit` bytes and one chunk have been taken.
    """
    length = request.headers.get("content-length", "")
    too_large = PayloadTooLarge(f"the body exceeds {limit} bytes")
    if length.isascii() and length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}
        return await request.receive()

    return Request(request.scope, receive)
