"""Which key a request was sent with, asked before its body is read."""

from typing import ClassVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from services.gateway.http.keys import MAX_KEY_CHARACTERS, Keys
from shared.errors import Unauthenticated
from shared.http.bounded_route import BoundedRoute, bearer_token


class AuthenticatedRoute(BoundedRoute):
    """A route that needs a key, and whose body is read whole, up to `max_body_bytes`."""

    reads_body: ClassVar[bool] = True

    async def authorise(self, request: Request) -> None:
        await authenticate(request, request.app.state.services.keys)

    def body_limit(self, request: Request) -> int | None:
        limit: int = request.app.state.services.settings.max_body_bytes
        return limit if self.reads_body else None


class StreamingRoute(AuthenticatedRoute):
    """A route that needs a key, and whose endpoint reads the body itself as it comes in."""

    reads_body = False


async def authenticate(request: Request, keys: Keys) -> None:
    """Find whose key a request has, as a bearer token or in Azure's header, and leave it on `request.state.owner`.

    Raises:
        Unauthenticated: no key, a malformed header, or an unknown or revoked key.
    """
    key = bearer_token(request) or _azures_key(request)
    if not key:
        raise Unauthenticated("send your API key as 'Authorization: Bearer ts-…'")
    owner = await run_in_threadpool(keys.owner_of, key) if len(key) <= MAX_KEY_CHARACTERS else None
    if owner is None:
        raise Unauthenticated("this API key is not valid")
    request.state.owner = owner


def _azures_key(request: Request) -> str:
    """What the one `api-key` header says; empty if there is another number of them, or another header for a key."""
    keys = request.headers.getlist("api-key")
    return keys[0].strip() if len(keys) == 1 and "authorization" not in request.headers else ""
