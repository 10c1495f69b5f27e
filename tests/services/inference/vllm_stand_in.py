"""A stand-in for a vLLM server, where none can run: its routes and words, and real tokens of the tiny base.

This project's own engine generates; what a request means and what an answer looks like is vLLM's, as
`engine/vllm_recorded.json` holds it. `make test-vllm` asks a real one.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from services.inference.adapters.weights import read_adapter
from services.inference.engine.grammar import Grammar, Grammars
from services.inference.engine.interface import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    GrammarText,
    Sampling,
    Started,
    Token,
)
from services.inference.engine.llama import LlamaRunner
from shared.errors import TunesmithError
from shared.http.web import IDLE_CONNECTION_SECONDS
from tests.services.inference.harness import EngineUnderTest, Tiny

# All that the engine may say: a new word is checked against a real server first.
FIELDS = {
    *("model", "prompt", "stream", "max_tokens", "logprobs", "prompt_logprobs", "ignore_eos", "stop_token_ids"),
    *("skip_special_tokens", "return_token_ids", "return_tokens_as_token_ids", "cache_salt", "structured_outputs"),
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("logit_bias", "seed"),
}


class VllmStandIn:
    """One server, on a port that it keeps.

    Attributes:
        asked: the bodies of completions, in order.
        loads: names in the order of their loads.
        adapters: name → its folder.
        hold: while it is cleared, no answer begins.
    """

    def __init__(self, tiny: Tiny, *, base: str = "tiny", rows: int = 4, context: int = 256) -> None:
        self.tiny, self.base = tiny, base
        self.under_test = EngineUnderTest(tiny, rows=rows, context=context)
        assert isinstance(self.under_test.runner, LlamaRunner)
        self.asked: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.adapters: dict[str, str] = {}
        self.hold = threading.Event()
        self.hold.set()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._server: uvicorn.Server | None = None

    # ------------------------------------------------------------------ its life

    def start(self) -> None:
        """As a fresh process: without adapters."""
        for name in self.adapters:
            self.under_test.engine.unload(name).result(120)
        self.adapters.clear()
        config = uvicorn.Config(
            self._app(),
            port=self._port,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        )
        config.timeout_graceful_shutdown = 0
        self._server = server = uvicorn.Server(config)
        self._thread = threading.Thread(target=server.run)
        self._thread.start()
        while not server.started:
            assert self._thread.is_alive(), "the stand-in did not start"
            time.sleep(0.005)

    def die(self) -> None:
        """Streams break off, connections are refused."""
        if self._server is not None:
            self._server.force_exit = self._server.should_exit = True
            self._thread.join(60)
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        self.under_test.engine.close()

    # ------------------------------------------------------------------ its routes

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", lambda _: Response()),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
            ]
        )

    async def _models(self, _: Request) -> Response:
        listed = [{"id": self.base, "object": "model", "parent": None}]
        listed += [{"id": name, "object": "model", "parent": self.base} for name in self.adapters]
        return JSONResponse({"object": "list", "data": listed})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        name, folder = body["lora_name"], Path(body["lora_path"])
        assert set(body) == {"lora_name", "lora_path"}
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter …")
        if not await asyncio.to_thread(folder.is_dir):
            return _error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        weights = await asyncio.to_thread(read_adapter, folder, self.under_test.engine.lora_modules, max_rank=256)
        await asyncio.wrap_future(self.under_test.engine.load(name, self.under_test.engine.prepare(weights)))
        self.adapters[name] = str(folder)
        self.loads.append(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        await asyncio.wrap_future(self.under_test.engine.unload(name))
        del self.adapters[name]
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        assert set(body) <= FIELDS, sorted(set(body) - FIELDS)
        if body["model"] != self.base and body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if body.get("prompt_logprobs") is not None:
            assert not body.get("stream"), "vLLM refuses these together"
            return JSONResponse(await self._scores(body))
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    def _request(self, body: dict[str, Any]) -> GenerationRequest:
        sampled = body["temperature"] > 0
        return GenerationRequest(
            body["prompt"],
            adapter=None if body["model"] == self.base else body["model"],
            max_new_tokens=body["max_tokens"],
            sampling=Sampling(
                do_sample=sampled,
                temperature=body["temperature"] if sampled else 1.0,
                top_k=body.get("top_k"),
                top_p=body.get("top_p"),
                min_p=body.get("min_p"),
                repetition_penalty=body["repetition_penalty"],
                frequency_penalty=body["frequency_penalty"],
                presence_penalty=body["presence_penalty"],
                logit_bias=tuple((int(token), bias) for token, bias in body.get("logit_bias", {}).items()),
                seed=body.get("seed", 0),
            ),
            ignore_eos=not body["stop_token_ids"],
            top_logprobs=body["logprobs"] or 0,
            grammar=self._grammar(body),
        )

    def _grammar(self, body: dict[str, Any]) -> Grammar | None:
        if not body.get("structured_outputs"):
            return None
        vocabulary = self.under_test.runner.vocabulary
        ((kind, source),) = body["structured_outputs"].items()
        kinds: dict[str, Any] = {"json": "json_schema", "regex": "regex", "grammar": "lark"}
        return Grammars(self.under_test.tokenizer, vocabulary)._grammar(GrammarText(kinds[kind], source))

    async def _events(self, request: GenerationRequest) -> AsyncIterator[Event]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def take(event: Event) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        handle = self.under_test.engine.submit(request, take)
        try:
            while True:
                event = await events.get()
                yield event
                if not isinstance(event, Started | Token):
                    return
        finally:
            self.under_test.engine.cancel(handle)

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        await asyncio.to_thread(self.hold.wait)
        try:
            async for event in self._events(self._request(body)):
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Token):
                    yield f"data: {json.dumps(self._chunk(body, event))}\n\n"
        except TunesmithError as error:
            yield f"data: {json.dumps(_error_body(500, error.message))}\n\n"
        yield "data: [DONE]\n\n"

    def _chunk(self, body: dict[str, Any], token: Token) -> dict[str, Any]:
        reasons = {"eos_token": "stop", "stop_sequence": "stop", "length": "length", None: None}
        scores = {f"token_id:{each.id}": each.logprob for each in token.alternatives}
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "text": token.text,
                    "logprobs": {
                        "text_offset": [0],
                        "token_logprobs": [token.logprob],
                        "tokens": [f"token_id:{token.id}"],
                        # The token itself is there too, whether it is one of the likeliest or not.
                        "top_logprobs": [{f"token_id:{token.id}": token.logprob} | scores],
                    },
                    "finish_reason": reasons[token.finish],
                    "stop_reason": token.id if token.finish == "eos_token" else None,
                    "token_ids": [token.id],
                }
            ],
        }

    async def _scores(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, most = body["prompt"], body["prompt_logprobs"]
        request = GenerationRequest(
            prompt,
            adapter=None if body["model"] == self.base else body["model"],
            max_new_tokens=0,
            prompt_logprobs=True,
            prompt_top_logprobs=most,
        )
        events = [event async for event in self._events(request)]
        started = next(event for event in events if isinstance(event, Started))
        assert isinstance(events[-1], Finished), events[-1]
        found: list[dict[str, Any] | None] = [None]
        others = started.prompt_alternatives or ((),) * len(started.prompt_logprobs)
        for token, logprob, likeliest in zip(prompt[1:], started.prompt_logprobs, others, strict=True):
            scores = {str(each.id): {"logprob": each.logprob} for each in likeliest}
            found.append(scores | {str(token): {"logprob": logprob}})
        return {"choices": [{"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": found}]}


def _error(status: int, message: str) -> Response:
    return JSONResponse(_error_body(status, message), status)


def _error_body(status: int, message: str) -> dict[str, Any]:
    kind = {404: "NotFoundError", 400: "BadRequestError"}.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
