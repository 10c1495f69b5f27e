"""Closes a connection whose request body nobody wants to read."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What a client may still be sending at this size is on its way already; reading it costs less than a new connection.
SMALL_BODY_BYTES = 64 << 10


class CloseUnread:
    """ASGI middleware: an answer given before a large body was read says `Connection: close`.

    Without it the server would go on to receive, only to throw away, all of an upload that it has refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_large(scope):
            await self._app(scope, receive, send)
            return
        unread = True

        async def receive_and_note() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                unread = False
            return message

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and unread:
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive_and_note, send_and_close)


def _is_large(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    return b"transfer-encoding" in headers or not length.isdigit() or int(length[:19]) > SMALL_BODY_BYTES
