"""Who may call inference: only those who know `TUNESMITH_INTERNAL_TOKEN`, the gateway among them.

Without a token it listens on the loopback interface alone. Then a page in a browser of this machine must not reach it
by a name that its owner let point here (DNS rebinding), so requests to other names are refused.
"""

import hmac

from fastapi import Request
from fastapi.routing import APIRoute

from services.inference.settings import LOOPBACK
from shared.errors import Unauthenticated
from shared.http.bounded_route import BoundedRoute, bearer_token


def internal_route(token: str, body_bytes: int) -> type[APIRoute]:
    """A class of routes that need `Authorization: Bearer <token>` (a local host if empty) and bound their bodies."""

    class InternalRoute(BoundedRoute):
        async def authorise(self, request: Request) -> None:
            if token and not hmac.compare_digest(bearer_token(request).encode(), token.encode()):
                raise Unauthenticated("this server needs its bearer token")
            if not token and request.url.hostname not in LOOPBACK:
                raise Unauthenticated("this server has no TUNESMITH_INTERNAL_TOKEN: ask it as 127.0.0.1 or localhost")

        def body_limit(self, request: Request) -> int | None:
            return body_bytes

    return InternalRoute
