"""OpenAI's dialect: chat completions, completions, models. `model` names the base or an adapter id."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from services.inference.engine.interface import GenerationRequest, Sampling, Token
from services.inference.prompts import ChatSource, PromptSource, RawIds, RawText
from services.inference.routes import headers
from services.inference.routes.schemas import MIN_DIVISOR, ChatCompletionBody, CompletionBody, plain
from services.inference.routes.streaming import begin
from services.inference.serving import Ask, Run, ServedBase, Serving
from shared.bases.catalogue import NO_MODEL_IN_PARTICULAR
from shared.errors import TunesmithError
from shared.http.disconnect import while_connected
from shared.http.event_stream import EventStreamResponse
from shared.http.web import error_body

_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
_ADAPTER_CODES = frozenset({"model_not_found", "adapter_refused", "adapter_corrupt", "adapter_too_large"})
_FIELDS = {"inputs": "prompt", "max_new_tokens": "max_tokens"}
_CHAT_FIELDS = _FIELDS | {"inputs": "messages"}


def adapter_of(model: str, base: ServedBase) -> str | None:
    """The adapter id that a `model` field names; None for the base."""
    return None if model in NO_MODEL_IN_PARTICULAR or model == base.id or model in base.aliases else model


def _sampling(body: ChatCompletionBody | CompletionBody) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(
        # 0 is greedy, and so is what cannot be told from it.
        do_sample=temperature >= MIN_DIVISOR,
        temperature=max(temperature, MIN_DIVISOR),
        top_k=body.top_k,
        top_p=body.top_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=secrets.randbits(63) if body.seed is None else body.seed % (1 << 63),
    )


@dataclass(slots=True)
class _Dialect:
    """The shapes of one of the two routes, for one answer."""

    chat: bool
    model: str
    fingerprint: str
    logprobs: bool
    tokenizer: Any
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def whole(self, text: str, tokens: list[Token], reason: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(tokens)}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return self.envelope([choice], chunk=False)

    def piece(self, text: str, tokens: list[Token], reason: str | None, *, first: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(tokens)}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({} if reason else {"content": text})
        else:
            choice["text"] = text
        return self.envelope([choice], chunk=True)

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._name(a.id): a.logprob for a in token.alternatives} for token in tokens],
            "text_offset": offsets,
        }

    def _chat_logprob(self, token: Token) -> dict[str, Any]:
        return self._entry(token.id, token.logprob) | {
            "top_logprobs": [self._entry(other.id, other.logprob) for other in token.alternatives]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

    def _name(self, token: int) -> str:
        name: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return name


def _usage(run: Run) -> dict[str, int]:
    prompt = len(run.request.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": run.generated, "total_tokens": prompt + run.generated}


def openai_router(route_class: type[APIRoute]) -> APIRouter:
    """The `/v1` routes, served by `request.app.state.serving`."""
    router = APIRouter(prefix="/v1", route_class=route_class, tags=["openai"])

    @router.post("/chat/completions", operation_id="chat_completions", responses=_RESPONSES)
    async def chat(body: ChatCompletionBody, request: Request) -> Response:
        source = ChatSource(plain(body.messages))
        alternatives = body.top_logprobs or 0
        limit = body.max_completion_tokens or body.max_tokens
        return await _answer(request, body, source, limit, 512, alternatives, logprobs=bool(body.logprobs))

    @router.post("/completions", operation_id="completions", responses=_RESPONSES)
    async def completions(body: CompletionBody, request: Request) -> Response:
        alternatives = body.logprobs or 0
        return await _answer(
            request, body, _prompt(body), body.max_tokens or 16, 16, alternatives, logprobs=body.logprobs is not None
        )

    @router.get("/models", operation_id="models")
    async def models(request: Request) -> dict[str, Any]:
        """The base, and the adapters that are here; others are loaded when they are named."""
        serving: Serving = request.app.state.serving
        names = [(serving.base.id, None)] + [(entry.id, serving.base.id) for entry in serving.adapters.entries()]
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "tunesmith", "parent": parent}
            for name, parent in names
        ]
        return {"object": "list", "data": data}

    return router


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A completion, or with `stream` server-sent events of its chunks, ended by `[DONE]`.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


def _prompt(body: CompletionBody) -> PromptSource:
    if isinstance(body.prompt, str):
        return RawText(body.prompt)
    if isinstance(body.prompt[0], str):
        return RawText(body.prompt[0])
    return RawIds([token for token in body.prompt if isinstance(token, int)])


async def _answer(
    request: Request,
    body: ChatCompletionBody | CompletionBody,
    source: PromptSource,
    limit: int | None,
    default: int,
    alternatives: int,
    *,
    logprobs: bool,
) -> Response:
    serving: Serving = request.app.state.serving
    base = serving.base
    generation = GenerationRequest(
        prompt=(),
        sampling=_sampling(body),
        stop=body.stops,
        keep_stop=False,
        ignore_eos=bool(body.ignore_eos),
        top_logprobs=alternatives,
    )
    ask = Ask(source, adapter_of(body.model, base), generation, limit, default)
    fingerprint = f"{base.revision[:12]}-{base.precision}"
    dialect = _Dialect(
        isinstance(body, ChatCompletionBody), _name(request, body, base), fingerprint, logprobs, serving.tokenizer
    )
    try:
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await _stream(request, serving, ask, dialect, with_usage)
        return await _whole(request, serving, ask, dialect)
    except TunesmithError as error:
        raise _in_openai_words(error, _CHAT_FIELDS if dialect.chat else _FIELDS) from error


def _name(request: Request, body: ChatCompletionBody | CompletionBody, base: ServedBase) -> str:
    """The model's name in the answer: what the gateway's client called it, if the gateway says so."""
    given = request.headers.get("x-model-name", "")
    return given if 0 < len(given) <= 256 else body.model or base.id


def _in_openai_words(error: TunesmithError, fields: Mapping[str, str]) -> TunesmithError:
    """The same error, naming the field of this dialect. A copy: one failed load is reported to many requests."""
    own = copy(error)
    if error.code in _ADAPTER_CODES:
        own.param = "model"
    elif error.param is not None:
        own.param = fields.get(error.param, error.param)
    return own


async def _whole(request: Request, serving: Serving, ask: Ask, dialect: _Dialect) -> Response:
    base = serving.base

    async def collect() -> Response:
        async with serving.run(ask) as run:
            tokens = [token async for token in run.tokens()]
            text = "".join(token.text for token in tokens)
            content = dialect.whole(text, tokens, _REASONS[str(run.finish)]) | {"usage": _usage(run)}
            return JSONResponse(content, headers=headers.full(run, base, len(run.prompt_text)))

    return await while_connected(request.receive, collect())


async def _stream(request: Request, serving: Serving, ask: Ask, dialect: _Dialect, with_usage: bool) -> Response:
    begun = await begin(request.receive, serving, ask)
    run = begun.run

    async def events() -> AsyncIterator[str]:
        first = True
        try:
            async for token in begun.tokens():
                if first or token.text or dialect.logprobs:
                    yield json.dumps(dialect.piece(token.text, [token], None, first=first))
                first = False
            yield json.dumps(dialect.piece("", [], _REASONS[str(run.finish)]))
            if with_usage:
                yield json.dumps(dialect.envelope([], chunk=True) | {"usage": _usage(run)})
            yield "[DONE]"
        except TunesmithError as error:
            yield json.dumps(error_body(error, request.url.path))

    return EventStreamResponse(events(), begun.close, headers.early(run, serving.base))
