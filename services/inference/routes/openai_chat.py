"""A generation as OpenAI's chat completion, whole or in chunks: messages, calls of tools, log probabilities."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from services.inference.engine.interface import Token
from services.inference.generation import Candidate, Generation
from services.inference.routes.openai_dialect import REASONS, OpenAIDialect, escaped, usage_of
from services.inference.serving import Serving
from services.inference.tool_calls import CallParser, CallPiece
from shared.http.event_stream import DONE
from shared.inference_api.openai import (
    AssistantMessageJson,
    ChatChoiceJson,
    ChatChunkChoiceJson,
    ChatCompletionBody,
    ChatCompletionChunkJson,
    ChatCompletionJson,
    ChatLogprobJson,
    ChatLogprobsJson,
    DeltaJson,
    FinishReason,
    TopLogprobJson,
)
from shared.inference_api.tools import (
    CalledFunctionDeltaJson,
    CalledFunctionJson,
    ToolCallDeltaJson,
    ToolCallJson,
)


class ChatDialect(OpenAIDialect):
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
        return ChatCompletionJson(**self._answer, object="chat.completion", choices=choices, usage=usage_of(generation))

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
        reason = REASONS[candidate.finish]
        parser = self._parsers.get(candidate.index)
        return "tool_calls" if parser and parser.called and reason == "stop" else reason

    def closing(self, generation: Generation) -> Iterable[BaseModel | str]:
        if self._with_usage:
            yield ChatCompletionChunkJson(
                **self._answer, object="chat.completion.chunk", choices=[], usage=usage_of(generation)
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
        return {"token": escaped(own) if name is None else name, "logprob": logprob, "bytes": list(own)}


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
