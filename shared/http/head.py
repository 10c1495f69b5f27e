"""HEAD wherever GET is answered: the same status and headers, and no body. Monitors and `wget --spider` ask so."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class _Answered(Exception):
    """Not an error: ends a GET whose head has been sent."""


class HeadAsGet:
    """ASGI middleware: the application answers GET, and is left as soon as it has sent the head."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        inner = {**scope, "method": "GET"}

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                raise _Answered

        try:
            await self._app(inner, receive, send_head)
        except _Answered:
            pass
        finally:
            # For the access line and the metrics.
            scope["route"] = inner.get("route")
