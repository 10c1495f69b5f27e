"""What a client is told whose request cannot be read as HTTP: the errors' own shape, where uvicorn sends plain text."""

import json
import secrets
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class UnreadableHeadProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, whose 400 and 431 are JSON in OpenAI's shape: no path is known that would ask for another."""

    def send_400_response(self, msg: str) -> None:
        # h11 knows what is too long; uvicorn asks for this while it handles that error.
        hint = getattr(sys.exc_info()[1], "error_status_hint", HTTPStatus.BAD_REQUEST)
        too_long = hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        # h11 says 501 of some that are the client's fault all the same.
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if too_long else HTTPStatus.BAD_REQUEST
        message = (
            "the request's line and headers are too long" if too_long else "this is no HTTP request that can be read"
        )
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "bad_request"}
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", f"req-{secrets.token_hex(12)}".encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
