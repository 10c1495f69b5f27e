"""OpenAI's dialect: chat completions, completions, models. `model` names the base or an adapter id."""

import secrets
import time
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from services.inference.engine.interface import FinishReason as EngineReason
from services.inference.engine.interface import GenerationRequest, Sampling, Token
from services.inference.generation import Generation, PromptRequest
from services.inference.prompts import ChatSource, PromptSource, RawIds, RawText, plain
from services.inference.routes.dependencies import ClientsModelName, ProjectTag, ServingDep
from services.inference.routes.respond import respond
from services.inference.serving import ServedBase, Serving
from shared.errors import TunesmithError
from shared.http.event_stream import DONE
from shared.inference_api.administration import ServedModelJson, ServedModelListJson
from shared.inference_api.documented import CHAT_ANSWERS, COMPLETION_ANSWERS
from shared.inference_api.fields import MIN_DIVISOR
from shared.inference_api.ignored import take_ignored
from shared.inference_api.openai import (
    CHAT_COMPLETIONS,
    COMPLETIONS,
    NO_MODEL_IN_PARTICULAR,
    AssistantMessageJson,
    ChatChoiceJson,
    ChatChunkChoiceJson,
    ChatCompletionBody,
    ChatCompletionChunkJson,
    ChatCompletionJson,
    ChatLogprobJson,
    ChatLogprobsJson,
    CompletionBody,
    CompletionChoiceJson,
    CompletionJson,
    CompletionLogprobsJson,
    DeltaJson,
    FinishReason,
    TopLogprobJson,
    UsageJson,
)

CHAT_NEW_TOKENS, COMPLETION_NEW_TOKENS = 512, 16
_REASONS: dict[EngineReason | None, FinishReason] = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
_ADAPTER_CODES = frozenset({"model_not_found", "adapter_refused", "adapter_corrupt", "adapter_too_large"})


def openai_router(route_class: type[APIRoute]) -> APIRouter:
    """The `/v1` routes."""
    router = APIRouter(route_class=route_class, tags=["openai"])
    router.post(CHAT_COMPLETIONS, operation_id="chat_completions", responses=CHAT_ANSWERS)(chat_completions)
    router.post(COMPLETIONS, operation_id="completions", responses=COMPLETION_ANSWERS)(completions)
    router.get("/v1/models", operation_id="models")(models)
    return router


async def chat_completions(
    body: ChatCompletionBody,
    request: Request,
    serving: ServingDep,
    project_tag: ProjectTag,
    model_name: ClientsModelName = "",
) -> Response:
    """Answer a conversation with the base or an adapter (`model`)."""
    asked = PromptRequest(
        ChatSource(plain(body.messages)),
        adapter_of(body.model, serving.base),
        _generation_request(body, body.top_logprobs or 0),
        body.max_completion_tokens or body.max_tokens,
        CHAT_NEW_TOKENS,
        truncate=body.truncate_prompt_tokens,
        project_tag=project_tag,
    )
    dialect = ChatDialect(serving, body, model_name, logprobs=bool(body.logprobs))
    return await respond(request, serving, asked, dialect, stream=bool(body.stream), ignored=take_ignored(body))


async def completions(
    body: CompletionBody,
    request: Request,
    serving: ServingDep,
    project_tag: ProjectTag,
    model_name: ClientsModelName = "",
) -> Response:
    """Complete a prompt with the base or an adapter (`model`)."""
    asked = PromptRequest(
        _source(body),
        adapter_of(body.model, serving.base),
        _generation_request(body, body.logprobs or 0),
        body.max_tokens or COMPLETION_NEW_TOKENS,
        truncate=body.truncate_prompt_tokens,
        project_tag=project_tag,
    )
    dialect = CompletionDialect(serving, body, model_name, logprobs=body.logprobs is not None)
    return await respond(request, serving, asked, dialect, stream=bool(body.stream), ignored=take_ignored(body))


async def models(serving: ServingDep) -> ServedModelListJson:
    """The base, and the adapters that are here; others are loaded when they are named."""
    base = ServedModelJson(id=serving.base.id, parent=None)
    adapters = [ServedModelJson(id=entry.id, parent=serving.base.id) for entry in serving.adapters.entries()]
    return ServedModelListJson(data=[base, *adapters])


def adapter_of(model: str | None, base: ServedBase) -> str | None:
    """The adapter id that a `model` field names; None for the base."""
    return (
        None if model is None or model in NO_MODEL_IN_PARTICULAR or model == base.id or model in base.aliases else model
    )


def _generation_request(body: ChatCompletionBody | CompletionBody, alternatives: int) -> GenerationRequest:
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = Sampling(
        # 0 is greedy, and so is what cannot be told from it.
        do_sample=temperature >= MIN_DIVISOR and body.top_p != 0,
        temperature=max(temperature, MIN_DIVISOR),
        top_k=body.top_k,
        top_p=body.top_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=secrets.randbits(63) if body.seed is None else body.seed % (1 << 63),
    )
    return GenerationRequest(
        prompt=(),
        sampling=sampling,
        stop=body.stops,
        keep_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        top_logprobs=alternatives,
    )


def _source(body: CompletionBody) -> PromptSource:
    if isinstance(body.prompt, str):
        return RawText(body.prompt)
    if isinstance(body.prompt[0], str):
        return RawText(body.prompt[0])
    return RawIds([token for token in body.prompt if isinstance(token, int)])


class _OpenAIDialect:
    """What both routes' answers share.

    Args:
        model_name: what the gateway's client called the model; the body's own name if empty.
        logprobs: whether log probabilities were asked for.
    """

    prefix: str
    fields: dict[str, str]

    def __init__(
        self, serving: Serving, body: ChatCompletionBody | CompletionBody, model_name: str, *, logprobs: bool
    ) -> None:
        base = serving.base
        self._tokenizer, self._logprobs_wanted, self._with_usage = serving.tokenizer, logprobs, body.includes_usage
        self._answer: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model_name or body.model or base.id,
            "system_fingerprint": f"{base.revision[:12]}-{base.precision}",
        }

    def translated(self, error: TunesmithError) -> TunesmithError:
        # A copy: one failed load is reported to many requests.
        own = copy(error)
        if error.code in _ADAPTER_CODES:
            own.param = "model"
        elif error.param is not None:
            own.param = self.fields.get(error.param, error.param)
        return own

    def _says_something(self, tokens: Sequence[Token]) -> bool:
        return bool(len(tokens) == 1 or tokens[-1].text or self._logprobs_wanted)

    def _name(self, token: int) -> str:
        name: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return name


class ChatDialect(_OpenAIDialect):
    """Chat completions."""

    prefix = "chatcmpl"
    fields: dict[str, str] = {"inputs": "messages", "max_new_tokens": "max_tokens"}  # noqa: RUF012

    def whole(self, generation: Generation, tokens: Sequence[Token]) -> BaseModel:
        choice = ChatChoiceJson(
            index=0,
            finish_reason=_REASONS[generation.finish],
            logprobs=self._logprobs(tokens),
            message=AssistantMessageJson(role="assistant", content=_text(tokens), refusal=None),
        )
        return ChatCompletionJson(**self._answer, object="chat.completion", choices=[choice], usage=_usage(generation))

    def event(self, generation: Generation, tokens: Sequence[Token]) -> BaseModel | None:
        if not self._says_something(tokens):
            return None
        text = tokens[-1].text
        delta = DeltaJson(role="assistant", content=text) if len(tokens) == 1 else DeltaJson(content=text)
        return self._chunk(delta, tokens[-1:], None)

    def closing(self, generation: Generation) -> Iterable[BaseModel | str]:
        yield self._chunk(DeltaJson(), [], _REASONS[generation.finish])
        if self._with_usage:
            yield ChatCompletionChunkJson(
                **self._answer, object="chat.completion.chunk", choices=[], usage=_usage(generation)
            )
        yield DONE

    def _chunk(self, delta: DeltaJson, tokens: Sequence[Token], reason: FinishReason | None) -> BaseModel:
        choice = ChatChunkChoiceJson(index=0, finish_reason=reason, logprobs=self._logprobs(tokens), delta=delta)
        return ChatCompletionChunkJson(**self._answer, object="chat.completion.chunk", choices=[choice])

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobsJson | None:
        if not self._logprobs_wanted:
            return None
        return ChatLogprobsJson(content=[self._logprob(token) for token in tokens], refusal=None)

    def _logprob(self, token: Token) -> ChatLogprobJson:
        others = [TopLogprobJson(**self._named(other.id, other.logprob)) for other in token.alternatives]
        return ChatLogprobJson(**self._named(token.id, token.logprob), top_logprobs=others)

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


class CompletionDialect(_OpenAIDialect):
    """Completions; a stream's chunks have the shape of the whole."""

    prefix = "cmpl"
    fields: dict[str, str] = {"inputs": "prompt", "max_new_tokens": "max_tokens"}  # noqa: RUF012

    def whole(self, generation: Generation, tokens: Sequence[Token]) -> BaseModel:
        answer = self._piece(_text(tokens), tokens, _REASONS[generation.finish])
        answer.usage = _usage(generation)
        return answer

    def event(self, generation: Generation, tokens: Sequence[Token]) -> BaseModel | None:
        return self._piece(tokens[-1].text, tokens[-1:], None) if self._says_something(tokens) else None

    def closing(self, generation: Generation) -> Iterable[BaseModel | str]:
        yield self._piece("", [], _REASONS[generation.finish])
        if self._with_usage:
            yield CompletionJson(**self._answer, object="text_completion", choices=[], usage=_usage(generation))
        yield DONE

    def _piece(self, text: str, tokens: Sequence[Token], reason: FinishReason | None) -> CompletionJson:
        choice = CompletionChoiceJson(index=0, finish_reason=reason, logprobs=self._logprobs(tokens), text=text)
        return CompletionJson(**self._answer, object="text_completion", choices=[choice])

    def _logprobs(self, tokens: Sequence[Token]) -> CompletionLogprobsJson | None:
        if not self._logprobs_wanted:
            return None
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        return CompletionLogprobsJson(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[{self._name(other.id): other.logprob for other in token.alternatives} for token in tokens],
            text_offset=offsets,
        )


def _text(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def _usage(generation: Generation) -> UsageJson:
    prompt, completion = len(generation.request.prompt), generation.generated
    return UsageJson(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
