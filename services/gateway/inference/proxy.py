"""Passes an answer of inference on to the client: bytes as they come, none held back, and nothing left running."""

from collections.abc import Mapping
from contextlib import suppress

import httpx
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shared.errors import Unavailable
from shared.http.disconnect import while_connected
from shared.http.event_stream import MEDIA_TYPE, encode_event
from shared.http.web import error_json

# Hop-by-hop headers (RFC 9110 §7.6.1), and those that this gateway sets itself.
_NOT_PASSED = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
    | {b"date", b"server", b"x-request-id"}
)


class ProxyResponse(Response):
    """Status, headers and body of `upstream`, which is closed at the end, also if the client leaves.

    Args:
        headers: added to those of `upstream`.
    """

    def __init__(self, upstream: httpx.Response, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=upstream.status_code)
        self.raw_headers = [(name.lower(), value) for name, value in upstream.headers.raw]
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name not in _NOT_PASSED]
        self.raw_headers += [(name.encode(), value.encode()) for name, value in headers.items()]
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with suppress(ClientDisconnect):
                await while_connected(receive, self._pump(scope["path"], send))
        finally:
            await self._upstream.aclose()

    async def _pump(self, path: str, send: Send) -> None:
        try:
            async for chunk in self._upstream.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.HTTPError:
            if not self._upstream.headers.get("content-type", "").startswith(MEDIA_TYPE):
                # The connection closes before the announced length: no client takes that for a whole answer.
                raise
            # The status has been sent; a stream can still say what happened.
            body = error_json(Unavailable("inference broke off the answer"), path)
            await send({"type": "http.response.body", "body": encode_event(body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
