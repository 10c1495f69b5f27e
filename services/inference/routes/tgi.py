"""text-generation-inference's dialect, as one superset that its own, LoRAX's and huggingface_hub's clients accept.

`POST /generate` answers an object, `POST /` a list, `/generate_stream` (and `stream: true` anywhere) server-sent
events. Differences from the original on purpose: an unknown adapter is 404, never the base; a stream that fails before
its first token has a real status; special tokens have empty text; log probabilities are the model's own.
"""

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from services.inference.engine.interface import GenerationRequest, Sampling, Token
from services.inference.prompts import ChatSource, InstructionSource, PromptSource, RawText
from services.inference.routes import headers
from services.inference.routes.schemas import GenerateBody, Parameters, plain
from services.inference.routes.streaming import begin
from services.inference.serving import Ask, Run, Serving
from shared.errors import InvalidRequest, TunesmithError
from shared.http.disconnect import while_connected
from shared.http.event_stream import EventStreamResponse
from shared.http.web import error_body

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The generated text with details if asked for; server-sent events of tokens if streamed.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


_LIST_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The same in a list of one; server-sent events of tokens if streamed.",
        "content": {
            "application/json": {"schema": {"type": "array", "items": {"type": "object"}}},
            "text/event-stream": {},
        },
    }
}


def tgi_router(route_class: type[APIRoute]) -> APIRouter:
    """The generate routes, served by `request.app.state.serving`."""
    router = APIRouter(route_class=route_class, tags=["generate"])

    @router.post("/generate", operation_id="generate", responses=_RESPONSES)
    async def generate(body: GenerateBody, request: Request) -> Response:
        return await (_stream(request, body) if body.stream else _whole(request, body, as_list=False))

    @router.post("/generate_stream", operation_id="generate_stream", responses=_RESPONSES)
    async def generate_stream(body: GenerateBody, request: Request) -> Response:
        return await _stream(request, body)

    @router.post("/", operation_id="generate_compat", responses=_LIST_RESPONSES)
    async def compat(body: GenerateBody, request: Request) -> Response:
        return await (_stream(request, body) if body.stream else _whole(request, body, as_list=True))

    return router


def ask_of(body: GenerateBody) -> Ask:
    """What the engine is asked for."""
    given = body.parameters or Parameters()
    sampled = given.sampled
    sampling = Sampling(
        do_sample=sampled,
        temperature=given.temperature or 1.0,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty or 1.0,
        seed=(secrets.randbits(63) if given.seed is None else given.seed) if sampled else 0,
    )
    request = GenerationRequest(
        prompt=(),
        sampling=sampling,
        stop=tuple(given.stop or ()),
        keep_stop=True,
        ignore_eos=bool(given.ignore_eos_token),
        top_logprobs=given.top_n_tokens or 0,
        prompt_logprobs=bool(given.decoder_input_details),
    )
    limit = 100 if given.max_new_tokens is None else given.max_new_tokens
    return Ask(_source(body), given.adapter_id or None, request, limit, truncate=given.truncate)


def _source(body: GenerateBody) -> PromptSource:
    if body.inputs is not None:
        return RawText(body.inputs)
    if body.instruction is not None:
        return InstructionSource(body.instruction, body.input or "")
    assert body.messages is not None
    return ChatSource(plain(body.messages))


def _characters(body: GenerateBody) -> int:
    given = (body.inputs, body.instruction, body.input)
    return sum(len(text) for text in given if text) + sum(len(m.plain().content) for m in body.messages or ())


class _Shapes:
    """Tokens and details as the dialect has them, for one answer."""

    def __init__(self, serving: Serving, run: Run, parameters: Parameters) -> None:
        self._serving, self._run, self._parameters = serving, run, parameters

    def text(self, tokens: list[Token]) -> str:
        prefix = self._run.prompt_text if self._parameters.return_full_text else ""
        return prefix + "".join(token.text for token in tokens)

    def token(self, token: Token) -> dict[str, Any]:
        return {
            "id": token.id,
            "text": token.text,
            "logprob": token.logprob,
            "special": token.special,
            "skipped": False,
        }

    def alternatives(self, token: Token) -> list[dict[str, Any]]:
        return [
            {"id": a.id, "text": self._name(a.id), "logprob": a.logprob, "special": False, "skipped": False}
            for a in token.alternatives
        ]

    def summary(self) -> dict[str, Any]:
        """`details` of a stream's last event: the names of text-generation-inference and of LoRAX."""
        run, base = self._run, self._serving.base
        prompt = len(run.request.prompt)
        return {
            "finish_reason": run.finish,
            "generated_tokens": run.generated,
            "seed": run.request.sampling.seed if run.request.sampling.do_sample else None,
            "input_length": prompt,
            "prompt_tokens": prompt,
            "skipped_tokens": 0,
            "model_id": base.id,
            "adapter_id": run.adapter_id,
            "adapter_load_ms": run.adapter_load_ms,
            "precision": base.precision,
        }

    def details(self, tokens: list[Token]) -> dict[str, Any]:
        details = self.summary() | {"prefill": self._prefill(), "tokens": [self.token(token) for token in tokens]}
        if self._parameters.top_n_tokens:
            details["top_tokens"] = [self.alternatives(token) for token in tokens]
        return details

    def _prefill(self) -> list[dict[str, Any]]:
        if not self._parameters.decoder_input_details or self._run.started is None:
            return []
        logprobs = [None, *self._run.started.prompt_logprobs]
        return [
            {"id": token, "text": self._name(token), "logprob": logprob}
            for token, logprob in zip(self._run.request.prompt, logprobs, strict=True)
        ]

    def _name(self, token: int) -> str:
        return self._serving.tokenizer.decode([token], skip_special_tokens=False)


async def _whole(request: Request, body: GenerateBody, *, as_list: bool) -> Response:
    serving: Serving = request.app.state.serving
    parameters = body.parameters or Parameters()
    # LoRAX and text-generation-inference return details for decoder_input_details too.
    detailed = parameters.details or parameters.decoder_input_details or parameters.top_n_tokens

    async def collect() -> Response:
        async with serving.run(ask_of(body)) as run:
            tokens = [token async for token in run.tokens()]
            shapes = _Shapes(serving, run, parameters)
            answer: dict[str, Any] = {"generated_text": shapes.text(tokens)}
            if detailed:
                answer["details"] = shapes.details(tokens)
            return JSONResponse(
                [answer] if as_list else answer, headers=headers.full(run, serving.base, _characters(body))
            )

    return await while_connected(request.receive, collect())


async def _stream(request: Request, body: GenerateBody) -> Response:
    serving: Serving = request.app.state.serving
    parameters = body.parameters or Parameters()
    if parameters.decoder_input_details:
        raise InvalidRequest("not supported when streaming", param="parameters.decoder_input_details")
    begun = await begin(request.receive, serving, ask_of(body))
    shapes = _Shapes(serving, begun.run, parameters)

    async def events() -> AsyncIterator[str]:
        said: list[Token] = []
        try:
            async for token in begun.tokens():
                said.append(token)
                last = token.finish is not None
                event = {
                    "index": len(said),
                    "token": shapes.token(token),
                    "generated_text": shapes.text(said) if last else None,
                    "details": shapes.summary() if last and parameters.details else None,
                }
                if parameters.top_n_tokens:
                    event["top_tokens"] = shapes.alternatives(token)
                yield json.dumps(event)
        except TunesmithError as error:
            yield json.dumps(error_body(error, request.url.path))

    return EventStreamResponse(events(), begun.close, headers.early(begun.run, serving.base))
