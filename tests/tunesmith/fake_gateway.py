"""A FAKE gateway: canned answers over real HTTP, for what the client does with them. The real one is in the journey.

An answer is a JSON object, or a list of bytes: pieces of an event stream.
"""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.tunesmith.answering_server import AnsweringServer

Json = dict[str, Any]
Answer = tuple[int, Json | list[bytes]]
KEY = "ts-fake-key-of-the-tests"


def job(status: str = "running", state: str | None = None, **more: Any) -> Json:
    """A job as the gateway returns it, with the keys the client reads."""
    fields: Json = {
        "id": "ftjob-1",
        "object": "fine_tuning.job",
        "status": status,
        "state": state or status,
        "phase": "training" if status == "running" else None,
        "model": "tiny",
        "fine_tuned_model": None,
        "error": None,
        "progress": {"step": 0, "total_steps": None},
    }
    return fields | more


def stream(*events: Json, done: bool = True) -> Answer:
    """An event stream, each event in a piece of its own; without `done` it breaks off."""
    pieces = []
    for event in events:
        number = f"id: {event['id']}\n" if "id" in event else ""
        pieces.append(f"{number}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
    return 200, [b": still here\n\n", *pieces, *([b"data: [DONE]\n\n"] if done else [])]


def error(status: int, message: str, code: str, param: str | None = None, **more: Any) -> Answer:
    kind = "invalid_request_error"
    return status, {"error": {"message": message, "type": kind, "code": code, "param": param, **more}}


class FakeGateway(AnsweringServer):
    """Answers `METHOD /path` from a table; a callable is called for each request with the request's JSON body."""

    def __init__(self, answers: dict[str, Answer | Callable[[Json], Answer]]) -> None:
        # An empty installation, unless a test says otherwise.
        self.answers = dict(answers)
        for route in ("models", "fine_tuning/jobs", "files"):
            self.answers.setdefault(f"GET /v1/{route}", (200, {"data": [], "has_more": False}))
        self.asked: list[str] = []
        self.bodies: list[tuple[str, Json]] = []
        self.forms: list[bytes] = []
        self.resumed: list[str | None] = []
        super().__init__()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        raw = request.rfile.read(int(request.headers.get("content-length") or 0))
        body = json.loads(raw) if request.headers.get("content-type") == "application/json" and raw else {}
        route = f"{request.command} {request.path.partition('?')[0]}"
        self.asked.append(route)
        if request.command != "GET":
            self.bodies.append((route, body))
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            self.forms.append(raw)
        if request.headers.get("accept") == "text/event-stream":
            self.resumed.append(request.headers.get("last-event-id"))
        status, answer = error(404, "no such thing", "not_found")
        if request.headers.get("authorization") != f"Bearer {KEY}":
            status, answer = error(401, "this API key is not valid", "invalid_api_key")
        elif route in self.answers:
            known = self.answers[route]
            status, answer = known(body) if callable(known) else known
        request.send_response(status)
        if isinstance(answer, list):
            # The end of the connection is the end of the body.
            request.send_header("content-type", "text/event-stream")
            request.end_headers()
            for piece in answer:
                request.wfile.write(piece)
                request.wfile.flush()
            return
        data = json.dumps(answer).encode()
        request.send_header("content-type", "application/json")
        request.send_header("content-length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)
