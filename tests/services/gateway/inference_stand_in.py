"""A stand-in for the inference service: a small real HTTP server that records what it is sent.

It has the private API's routes and the shapes of its answers, and no model. The journey test uses the real one.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from shared.inference_api.administration import InfoJson
from tests.services.gateway.conftest import served


def info_of(base: str) -> InfoJson:
    """What a process that serves `base` says of itself."""
    numbers = {name: 4 for name, field in InfoJson.model_fields.items() if field.annotation is int}
    texts = {name: "x" for name, field in InfoJson.model_fields.items() if field.annotation is str}
    return InfoJson.model_validate({**numbers, **texts, "base": base, "aliases": [], "measured": []})


@dataclass
class StandIn:
    """What was sent, and how to answer.

    Attributes:
        sent: (method and path, body or None, headers) of every request but `/info` and loads of adapters.
        loaded: (adapter id, query) of every load asked for; `load_statuses` are the answers to the next ones, then 200.
        unfinished: a stream waits after its first event while it is set.
        broken: a stream breaks after its first event.
        flooding: a stream goes on in chunks of 64 KiB, `flooded` counts those that have been taken off its hands.
        slow: no answer to a generation while it is set; `hanging`: no answer to anything.
        words: what a streamed chat completion says, chunk by chunk; `reason` is why it ends.
        calls: (id, name, arguments) of the functions that a chat completion calls after its text, streamed or not.
        started, closed: paths of slow or unfinished requests, when they began and when their client was gone.
    """

    base: str
    token: str = ""
    url: str = ""
    status: int = 200
    unfinished: bool = False
    broken: bool = False
    flooding: bool = False
    flooded: int = 0
    slow: bool = False
    hanging: bool = False
    words: list[str] = field(default_factory=list)
    reason: str = "stop"
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    sent: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)
    loaded: list[tuple[str, str]] = field(default_factory=list)
    load_statuses: list[int] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/info")
        async def info(request: Request) -> Response:
            if self.hanging:
                await self._held(request)
            if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
                return JSONResponse({"error": "no"}, 401)
            return JSONResponse(info_of(self.base).model_dump())

        @app.put("/adapters/{adapter_id}")
        async def load(adapter_id: str, request: Request) -> Response:
            self.loaded.append((adapter_id, request.url.query))
            return JSONResponse({"id": adapter_id}, self.load_statuses.pop(0) if self.load_statuses else 200)

        @app.delete("/adapters/{adapter_id}")
        async def unload(adapter_id: str, request: Request) -> dict[str, Any]:
            self.sent.append((f"DELETE /adapters/{adapter_id}", None, dict(request.headers)))
            return {"id": adapter_id, "unloaded": True}

        for path in ("/generate", "/generate_stream", "/", "/v1/chat/completions", "/v1/completions"):
            app.post(path)(self._answer)
        return app

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        path = request.url.path
        self.sent.append((f"POST {path}", body, dict(request.headers)))
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": "no"}, 401)
        if self.status != 200:
            own = {"error": {"message": "full", "type": "overloaded", "param": None, "code": "overloaded"}}
            return JSONResponse(own, self.status, {"retry-after": "7"})
        if self.slow or self.hanging:
            self.started.append(path)
            if await self._held(request):
                self.closed.append(path)
        headers = {"x-generated-tokens": "2", "x-request-id": "not-yours"}
        if (self.words or self.calls) and body.get("stream"):
            model = request.headers.get("x-model-name", body.get("model") or self.base)
            return StreamingResponse(self._chunks(model), media_type="text/event-stream", headers=headers)
        if path == "/generate_stream" or body.get("stream"):
            return StreamingResponse(self._tokens(request), media_type="text/event-stream", headers=headers)
        if path == "/v1/chat/completions":
            model = request.headers.get("x-model-name", body["model"])
            message: dict[str, Any] = {"role": "assistant", "content": "4", "refusal": None}
            if self.calls:
                message |= {"content": None, "tool_calls": [_call(*each) for each in self.calls]}
            reason = "tool_calls" if self.calls else "stop"
            choice = {"index": 0, "finish_reason": reason, "message": message, "logprobs": None}
            answer: Any = {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": model,
                "choices": [choice],
            }
        else:
            answer = {"generated_text": "4"}
        return JSONResponse([answer] if path == "/" else answer, headers=headers)

    async def _held(self, request: Request) -> bool:
        """Wait while answers are held back. Whether the client has left."""

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        leaving = asyncio.ensure_future(left())
        while (self.slow or self.hanging) and not leaving.done():  # noqa: ASYNC110 (set by the test's thread)
            await asyncio.sleep(0.01)
        gone = leaving.done()
        leaving.cancel()
        return gone

    async def _chunks(self, model: str) -> AsyncIterator[bytes]:
        """A chat completion as a stream."""
        common: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
        choices: list[dict[str, Any]] = [
            {"index": 0, "finish_reason": None, "delta": {"content": word}} for word in self.words
        ]
        for place, (call_id, name, arguments) in enumerate(self.calls):
            # The name comes first, then the arguments in pieces.
            deltas = [_call(call_id, name, ""), {"function": {"arguments": arguments[:4]}}]
            deltas.append({"function": {"arguments": arguments[4:]}})
            for each in deltas:
                delta = {"tool_calls": [{"index": place, **each}]}
                choices.append({"index": 0, "finish_reason": None, "delta": delta})
        choices.append({"index": 0, "finish_reason": self.reason, "delta": {}})
        for choice in choices:
            yield f"data: {json.dumps(common | {'choices': [choice]})}\n\n".encode()
            if self.broken:
                raise OSError("the process died")
        usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        yield f"data: {json.dumps(common | {'choices': [], 'usage': usage})}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def _tokens(self, request: Request) -> AsyncIterator[bytes]:
        yield b'data: {"token":{"text":"first"}}\n\n'
        try:
            while self.unfinished:  # noqa: ASYNC110 (set by the test's thread)
                await asyncio.sleep(0.01)
            while self.flooding:
                yield b"data: " + b"x" * (64 << 10) + b"\n\n"
                self.flooded += 1
                await asyncio.sleep(0)
            if self.broken:
                raise OSError("the process died")
            yield b'data: {"token":{"text":"last"}}\n\n'
        except asyncio.CancelledError:
            self.closed.append(request.url.path)
            raise


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@contextmanager
def standing_in(base: str, **kind: Any) -> Iterator[StandIn]:
    stand_in = StandIn(base, **kind)
    with served(stand_in.app()) as url:
        stand_in.url = url
        yield stand_in
