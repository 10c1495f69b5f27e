"""What is decided before a request body is read: who asks, and how much may be sent.

A route class, not a dependency (FastAPI reads the body before dependencies run) and not middleware on paths (a path can
be disguised; a route that was matched cannot).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive

from shared.errors import PayloadTooLarge, UnsupportedMediaType

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
# As many digits as 64 bits can have; Python refuses to read numbers of several thousand.
_MAX_LENGTH_DIGITS = 19


class BoundedRoute(APIRoute, ABC):
    """A route whose endpoint sees authorised requests only, with a body of bounded size.

    Attributes:
        always_json: the body is taken for JSON whatever it is called: `curl -d` without a header calls it a form.
    """

    always_json: ClassVar[bool] = False

    @abstractmethod
    async def authorise(self, request: Request) -> None:
        """Raise Unauthenticated unless the caller may use this route. The body has not been read."""

    @abstractmethod
    def body_limit(self, request: Request) -> int | None:
        """How many bytes of body are read before the endpoint runs; None if the endpoint reads the body itself."""

    def get_route_handler(self) -> Handler:
        endpoint = super().get_route_handler()

        async def handler(request: Request) -> Response:
            await self.authorise(request)
            if request.headers.get("content-encoding", "identity").lower() != "identity":
                raise UnsupportedMediaType("compressed request bodies are not accepted")
            receive, limit = request.receive, self.body_limit(request)
            if limit is not None:
                receive = _replay(await read_bounded(request, limit), receive)
            if self.always_json:
                MutableHeaders(scope=request.scope)["content-type"] = "application/json"
            return await endpoint(Request(request.scope, receive))

        return handler


def bearer_token(request: Request) -> str:
    """What follows `Bearer` in the one `Authorization` header; empty if there is none, or more than one."""
    headers = request.headers.getlist("authorization")
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" else ""


async def read_bounded(request: Request, limit: int) -> bytes:
    """The body, read while it stays within `limit` bytes.

    Raises:
        PayloadTooLarge: it is larger, or announced to be; no more than `limit` bytes and one chunk have been read.
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
    if declared.isdecimal() and int(declared[:_MAX_LENGTH_DIGITS]) > limit:
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
