"""OpenAI's dialect: chat completions, completions, models. `model` names the base or an adapter id."""

import secrets
import time
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from services.inference.engine.interface import Alternative, GenerationRequest, GrammarText, Sampling, Token
from services.inference.engine.interface import FinishReason as EngineReason
from services.inference.engine.text import Detokenizer
from services.inference.generation import Candidate, Generation, PromptRequest
from services.inference.prompts import ChatSource, RawIds, RawText, plain
from services.inference.routes.dependencies import ClientsModelName, ProjectTag, ServingDep
from services.inference.routes.respond import respond
from services.inference.serving import ServedBase, Serving
from services.inference.tool_calls import CallParser, CallPiece, Tools
from shared.datasets.tokens import Tokenizer
from shared.errors import InvalidRequest, TunesmithError
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
from shared.inference_api.tools import (
    CalledFunctionDeltaJson,
    CalledFunctionJson,
    NamedTool,
    ToolCallDeltaJson,
    ToolCallJson,
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
    grammar = body.response_format.grammar if body.response_format else None
    bound = GrammarText(*grammar) if grammar else None
    tools = _tools(body, bound)
    asked = PromptRequest(
        [
            ChatSource(
                plain(body.messages),
                tools=tools.functions if tools else (),
                variables=body.variables,
                effort=body.reasoning_effort,
                continue_final=body.continues,
            )
        ],
        adapter_of(body.model, serving.base),
        _generation_request(body, body.top_logprobs or 0),
        body.max_completion_tokens or body.max_tokens,
        CHAT_NEW_TOKENS,
        truncate=body.truncate_prompt_tokens,
        project_tag=project_tag,
        candidates=body.n or 1,
        seeded=body.seed is not None,
        grammar=bound,
        tools=tools,
    )
    dialect = ChatDialect(serving, body, model_name, logprobs=bool(body.logprobs), tools=tools is not None)
    ignored = [*take_ignored(body), *_unheard(body, serving)]
    return await respond(request, serving, asked, dialect, stream=bool(body.stream), ignored=ignored)


async def completions(
    body: CompletionBody,
    request: Request,
    serving: ServingDep,
    project_tag: ProjectTag,
    model_name: ClientsModelName = "",
) -> Response:
    """Complete one or more prompts with the base or an adapter (`model`)."""
    generation_request = _generation_request(body, body.logprobs or 0)
    if body.echo and body.logprobs is not None:
        generation_request = replace(generation_request, prompt_logprobs=True, prompt_top_logprobs=body.logprobs)
    asked = PromptRequest(
        [RawText(prompt) if isinstance(prompt, str) else RawIds(prompt) for prompt in body.prompts],
        adapter_of(body.model, serving.base),
        generation_request,
        COMPLETION_NEW_TOKENS if body.max_tokens is None else body.max_tokens,
        truncate=body.truncate_prompt_tokens,
        project_tag=project_tag,
        candidates=body.candidates,
        seeded=body.seed is not None,
    )
    dialect = CompletionDialect(serving, body, model_name)
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


def _unheard(body: ChatCompletionBody, serving: Serving) -> list[str]:
    """What is said to the base's chat template that it has no ear for; other formats have none at all."""
    chat = serving.tokenizer.chat
    if not body.variables and body.reasoning_effort is None:
        return []
    try:
        names, effort = (chat.names, chat.effort(body.reasoning_effort or "")) if chat else (frozenset(), {})
    except InvalidRequest:
        return []
    unheard = [f"chat_template_kwargs.{name}" for name in body.variables if name not in names]
    return unheard if effort or body.reasoning_effort is None else [*unheard, "reasoning_effort"]


def _tools(body: ChatCompletionBody, otherwise: GrammarText | None) -> Tools | None:
    """What may be called; nothing is offered if nothing may."""
    if not body.tools or body.tool_choice == "none":
        return None
    must = {"required": "any"}.get(body.tool_choice) if isinstance(body.tool_choice, str) else None
    if isinstance(body.tool_choice, NamedTool):
        must = body.tool_choice.function.name
    return Tools(
        [tool.written for tool in body.tools],
        frozenset(tool.function.name for tool in body.tools if tool.function.strict),
        must,
        parallel=body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool),
        otherwise=otherwise,
    )


def _generation_request(body: ChatCompletionBody | CompletionBody, alternatives: int) -> GenerationRequest:
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = Sampling(
        # 0 is greedy, and so is what cannot be told from it.
        do_sample=temperature >= MIN_DIVISOR and body.top_p != 0,
        temperature=max(temperature, MIN_DIVISOR),
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        typical_p=body.typical_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=tuple((body.logit_bias or {}).items()),
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


@dataclass(frozen=True, slots=True)
class _Piece:
    """A token of a choice's text, from the prompt or generated."""

    id: int
    text: str
    logprob: float | None
    alternatives: Sequence[Alternative] | None


class _OpenAIDialect:
    """What both routes' answers share.

    Args:
        model_name: what the gateway's client called the model; the body's own name if empty.
        logprobs: whether log probabilities were asked for.
    """

    prefix: str
    fields: dict[str, str]
    grammar_field = "response_format"

    def __init__(
        self, serving: Serving, body: ChatCompletionBody | CompletionBody, model_name: str, *, logprobs: bool
    ) -> None:
        base = serving.base
        self._token_bytes, self._logprobs_wanted, self._with_usage = serving.token_bytes, logprobs, body.includes_usage
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
        elif error.code == "invalid_grammar":
            own.param = self.grammar_field
        elif error.param is not None:
            own.param = self.fields.get(error.param, error.param)
        return own

    def _says_something(self, candidate: Candidate) -> bool:
        tokens = candidate.tokens
        return bool(tokens and (len(tokens) == 1 or tokens[-1].text or self._logprobs_wanted))


class ChatDialect(_OpenAIDialect):
    """Chat completions."""

    prefix = "chatcmpl"
    fields: dict[str, str] = {"inputs": "messages", "max_new_tokens": "max_tokens"}  # noqa: RUF012

    def __init__(
        self, serving: Serving, body: ChatCompletionBody, model_name: str, *, logprobs: bool, tools: bool = False
    ) -> None:
        super().__init__(serving, body, model_name, logprobs=logprobs)
        self._parsers: dict[int, CallParser] = {}
        if tools:
            self.grammar_field = "tools"

    def whole(self, generation: Generation) -> BaseModel:
        choices = []
        for candidate in generation.candidates:
            # Whether it calls is known once it is parsed.
            message = self._message(generation, candidate)
            logprobs = self._logprobs(candidate.tokens, first=True)
            reason = self._reason(candidate)
            choices.append(
                ChatChoiceJson(index=candidate.index, finish_reason=reason, logprobs=logprobs, message=message)
            )
        return ChatCompletionJson(**self._answer, object="chat.completion", choices=choices, usage=_usage(generation))

    def events(self, generation: Generation, candidate: Candidate) -> Iterable[BaseModel]:
        first = len(candidate.tokens) == 1
        if generation.call_form:
            yield from self._call_events(generation, candidate, first=first)
        elif self._says_something(candidate):
            text = candidate.tokens[-1].text
            delta = DeltaJson(role="assistant", content=text) if first else DeltaJson(content=text)
            yield self._chunk(candidate, delta, self._logprobs(candidate.tokens[-1:], first=first), None)
        if candidate.finish:
            yield self._chunk(candidate, DeltaJson(), self._logprobs([], first=False), self._reason(candidate))

    def _message(self, generation: Generation, candidate: Candidate) -> AssistantMessageJson:
        if generation.call_form is None:
            return AssistantMessageJson(role="assistant", content=candidate.text, refusal=None)
        parser = self._parser(generation, candidate)
        pieces = [*parser.push(candidate.text), *parser.flush()]
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        message = AssistantMessageJson(role="assistant", content=text or None if parser.called else text, refusal=None)
        if parser.called:
            message.tool_calls = [
                ToolCallJson(
                    id=_call_id(),
                    type="function",
                    function=CalledFunctionJson(
                        name=begun.name,
                        arguments="".join(
                            each.arguments
                            for each in pieces
                            if isinstance(each, CallPiece) and each.index == begun.index
                        ),
                    ),
                )
                for begun in pieces
                if isinstance(begun, CallPiece) and begun.name
            ]
        return message

    def _call_events(self, generation: Generation, candidate: Candidate, *, first: bool) -> Iterable[BaseModel]:
        """Text and calls, as soon as they can be told apart; log probabilities come with their token in any case."""
        parser = self._parser(generation, candidate)
        pieces = parser.push(candidate.tokens[-1].text) if candidate.tokens else []
        if candidate.finish:
            pieces += parser.flush()
        logprobs = self._logprobs(candidate.tokens[-1:], first=first)
        deltas = [_delta(piece) for piece in pieces]
        if first:
            deltas = [DeltaJson(role="assistant", content=None), *deltas]
        elif not deltas and logprobs:
            deltas = [DeltaJson()]
        for place, delta in enumerate(deltas):
            yield self._chunk(candidate, delta, self._logprobs([], first=False) if place else logprobs, None)

    def _parser(self, generation: Generation, candidate: Candidate) -> CallParser:
        assert generation.call_form
        return self._parsers.setdefault(candidate.index, CallParser(generation.call_form))

    def _reason(self, candidate: Candidate) -> FinishReason:
        reason = _REASONS[candidate.finish]
        parser = self._parsers.get(candidate.index)
        return "tool_calls" if parser and parser.called and reason == "stop" else reason

    def closing(self, generation: Generation) -> Iterable[BaseModel | str]:
        if self._with_usage:
            yield ChatCompletionChunkJson(
                **self._answer, object="chat.completion.chunk", choices=[], usage=_usage(generation)
            )
        yield DONE

    def _chunk(
        self, candidate: Candidate, delta: DeltaJson, logprobs: ChatLogprobsJson | None, reason: FinishReason | None
    ) -> BaseModel:
        choice = ChatChunkChoiceJson(index=candidate.index, finish_reason=reason, logprobs=logprobs, delta=delta)
        return ChatCompletionChunkJson(**self._answer, object="chat.completion.chunk", choices=[choice])

    def _logprobs(self, tokens: Sequence[Token], *, first: bool) -> ChatLogprobsJson | None:
        """Of tokens that stand next to each other, at the text's beginning or not."""
        if not self._logprobs_wanted:
            return None
        content = [self._logprob(token, first=first and not place) for place, token in enumerate(tokens)]
        return ChatLogprobsJson(content=content, refusal=None)

    def _logprob(self, token: Token, *, first: bool) -> ChatLogprobJson:
        others = [TopLogprobJson(**self._named(other.id, other.logprob, first=first)) for other in token.alternatives]
        return ChatLogprobJson(**self._named(token.id, token.logprob, first=first), top_logprobs=others)

    def _named(self, token: int, logprob: float, *, first: bool) -> dict[str, Any]:
        """As OpenAI writes them: a token that is no text alone by its bytes."""
        own = self._token_bytes.of(token, first=first)
        name = self._token_bytes.name(token)
        return {"token": _escaped(own) if name is None else name, "logprob": logprob, "bytes": list(own)}


class CompletionDialect(_OpenAIDialect):
    """Completions; a stream's chunks have the shape of the whole."""

    prefix = "cmpl"
    fields: dict[str, str] = {"inputs": "prompt", "max_new_tokens": "max_tokens"}  # noqa: RUF012

    def __init__(self, serving: Serving, body: CompletionBody, model_name: str) -> None:
        super().__init__(serving, body, model_name, logprobs=body.logprobs is not None)
        self._tokenizer, self._n = serving.tokenizer, body.n or 1
        self._echoed = body.prompts if body.echo else []

    def whole(self, generation: Generation) -> BaseModel:
        choices = []
        for index, candidate in enumerate(self._returned(generation)):
            pieces = self._prompt(generation, candidate) + self._generated(candidate.tokens)
            choices.append(self._choice(index, pieces, 0, _REASONS[candidate.finish]))
        answer = CompletionJson(**self._answer, object="text_completion", choices=choices)
        answer.usage = _usage(generation)
        return answer

    def events(self, generation: Generation, candidate: Candidate) -> Iterable[BaseModel]:
        new = candidate.tokens[-1:]
        before = self._prompt(generation, candidate)
        if len(candidate.tokens) <= 1 and before:
            yield self._chunk(candidate, before, 0, None)
        if self._says_something(candidate):
            at = len(_joined(before)) + sum(len(token.text) for token in candidate.tokens[:-1])
            yield self._chunk(candidate, self._generated(new), at, None)
        if candidate.finish:
            yield self._chunk(candidate, [], 0, _REASONS[candidate.finish])

    def closing(self, generation: Generation) -> Iterable[BaseModel | str]:
        if self._with_usage:
            yield CompletionJson(**self._answer, object="text_completion", choices=[], usage=_usage(generation))
        yield DONE

    def _returned(self, generation: Generation) -> Iterable[Candidate]:
        """Of each prompt's candidates the `n` likeliest, the best first; as they are if all are returned."""
        for begin in range(0, len(generation.candidates), generation.per_prompt):
            own = generation.candidates[begin : begin + generation.per_prompt]
            yield from own if self._n == len(own) else sorted(own, key=lambda each: -each.mean_logprob)[: self._n]

    def _chunk(self, candidate: Candidate, pieces: list[_Piece], at: int, reason: FinishReason | None) -> BaseModel:
        choice = self._choice(candidate.index, pieces, at, reason)
        return CompletionJson(**self._answer, object="text_completion", choices=[choice])

    def _choice(self, index: int, pieces: list[_Piece], at: int, reason: FinishReason | None) -> CompletionChoiceJson:
        return CompletionChoiceJson(
            index=index, finish_reason=reason, logprobs=self._logprobs(pieces, at), text=_joined(pieces)
        )

    def _prompt(self, generation: Generation, candidate: Candidate) -> list[_Piece]:
        """The prompt token by token, if it is to be repeated."""
        if not self._echoed:
            return []
        prompt = self._echoed[candidate.index // generation.per_prompt]
        ids, started = candidate.request.prompt, candidate.started
        logprobs: list[float | None] = [None, *(started.prompt_logprobs if started else ())]
        others: list[Sequence[Alternative] | None] = [None, *(started.prompt_alternatives if started else ())]
        texts = _texts_of(ids, prompt if isinstance(prompt, str) else None, self._tokenizer)
        return [
            _Piece(token, text, logprob, top) for token, text, logprob, top in zip_longest(ids, texts, logprobs, others)
        ]

    def _generated(self, tokens: Sequence[Token]) -> list[_Piece]:
        return [_Piece(token.id, token.text, token.logprob, token.alternatives) for token in tokens]

    def _logprobs(self, pieces: list[_Piece], at: int) -> CompletionLogprobsJson | None:
        """Of pieces that stand next to each other, the first at so many characters of the choice's text."""
        if not self._logprobs_wanted:
            return None
        offsets = list(accumulate((len(piece.text) for piece in pieces), initial=at))
        return CompletionLogprobsJson(
            tokens=[self._name(piece.id) for piece in pieces],
            token_logprobs=[piece.logprob for piece in pieces],
            top_logprobs=[self._likeliest(piece) for piece in pieces],
            text_offset=offsets[:-1],
        )

    def _likeliest(self, piece: _Piece) -> dict[str, float] | None:
        if piece.alternatives is None:
            return None
        # Backwards: of two tokens with one name the likelier counts.
        return {self._name(other.id): other.logprob for other in reversed(piece.alternatives)}

    def _name(self, token: int) -> str:
        """As OpenAI writes them: a token that is no text alone by its bytes."""
        name = self._token_bytes.name(token)
        return f"bytes:{_escaped(self._token_bytes.of(token))}" if name is None else name


def _texts_of(ids: Sequence[int], text: str | None, tokenizer: Tokenizer) -> list[str]:
    """What each of a prompt's tokens adds to its text; joined they are `text`, or the ids' own text if that is None."""
    stream = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [stream.push(token) for token in ids]
    pieces[-1] += stream.flush()
    if text is None:
        return pieces
    at = 0
    for place, piece in enumerate(pieces):
        # A token that the tokenizer put in by itself, for the beginning, is not in the text.
        pieces[place] = piece if text.startswith(piece, at) else ""
        at += len(pieces[place])
    pieces[-1] += text[at:]
    return pieces


def _delta(piece: str | CallPiece) -> DeltaJson:
    if isinstance(piece, str):
        return DeltaJson(content=piece)
    if not piece.name:
        call = ToolCallDeltaJson(index=piece.index, function=CalledFunctionDeltaJson(arguments=piece.arguments))
    else:
        function = CalledFunctionDeltaJson(name=piece.name, arguments="")
        call = ToolCallDeltaJson(index=piece.index, id=_call_id(), type="function", function=function)
    return DeltaJson(tool_calls=[call])


def _call_id() -> str:
    """Nine letters and digits: some templates take no other ids."""
    return secrets.token_hex(5)[:9]


def _joined(pieces: Iterable[_Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _escaped(content: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in content)


def _usage(generation: Generation) -> UsageJson:
    prompt, completion = generation.prompt_tokens, generation.generated
    return UsageJson(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
