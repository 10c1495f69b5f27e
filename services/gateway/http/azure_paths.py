"""Azure's spelling of OpenAI's paths: `/openai/deployments/{model}/…`, `/openai/v1/…` and `/openai/…`.

A path is respelled before it is routed, so that everything else, the check of the key among it, sees OpenAI's own.
"""

import re

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

_DEPLOYMENT = re.compile(
    r"/openai/deployments/(.+?)(/chat/completions|/completions|/embeddings|/(?:audio|images)/[a-z]+)"
)
_PLAIN = re.compile(r"/openai(?:/v1)?(/.+)")
_STATE = "azure_deployment"


class AzurePaths:
    """ASGI middleware. `deployment_of` says which model the path of a request has named."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/openai/"):
            if match := _DEPLOYMENT.fullmatch(scope["path"]):
                scope.setdefault("state", {})[_STATE] = match[1]
                scope["path"] = "/v1" + match[2]
            elif match := _PLAIN.fullmatch(scope["path"]):
                scope["path"] = "/v1" + match[1]
        await self._app(scope, receive, send)


def deployment_of(request: Request) -> str | None:
    """The model that Azure's path names; it counts, whatever the body says. None if the path is OpenAI's own."""
    return getattr(request.state, _STATE, None)
