"""Who may call inference: only those who know `TUNESMITH_INTERNAL_TOKEN`, the gateway among them."""

import hmac

from fastapi import Request
from fastapi.routing import APIRoute

from shared.errors import Unauthenticated
from shared.http.bounded_route import BoundedRoute, bearer_token


def internal_route(token: str, body_bytes: int) -> type[APIRoute]:
    """A class of routes that need `Authorization: Bearer <token>` (nothing if empty) and bound their bodies."""

    class InternalRoute(BoundedRoute):
        async def authorise(self, request: Request) -> None:
            if token and not hmac.compare_digest(bearer_token(request).encode(), token.encode()):
                raise Unauthenticated("this server needs its bearer token")

        def body_limit(self, request: Request) -> int | None:
            return body_bytes

    return InternalRoute
