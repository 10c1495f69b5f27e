"""A generation as OpenAI's completion, whole or in chunks: texts, echoed prompts, log probabilities."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest

from pydantic import BaseModel

from services.inference.engine.interface import Alternative, Token
from services.inference.engine.text import Detokenizer
from services.inference.generation import Candidate, Generation
from services.inference.routes.openai_dialect import REASONS, OpenAIDialect, escaped, usage_of
from services.inference.serving import Serving
from shared.datasets.tokens import Tokenizer
from shared.http.event_stream import DONE
from shared.inference_api.openai import (
    CompletionBody,
    CompletionChoiceJson,
    CompletionJson,
    CompletionLogprobsJson,
    FinishReason,
)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A token of a choice's text, from the prompt or generated."""

    id: int
    text: str
    logprob: float | None
    alternatives: Sequence[Alternative] | None


class CompletionDialect(OpenAIDialect):
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
            choices.append(self._choice(index, pieces, 0, REASONS[candidate.finish]))
        answer = CompletionJson(**self._answer, object="text_completion", choices=choices)
        answer.usage = usage_of(generation)
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
            yield self._chunk(candidate, [], 0, REASONS[candidate.finish])

    def closing(self, generation: Generation) -> Iterable[BaseModel | str]:
        if self._with_usage:
            yield CompletionJson(**self._answer, object="text_completion", choices=[], usage=usage_of(generation))
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
        return f"bytes:{escaped(self._token_bytes.of(token))}" if name is None else name


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


def _joined(pieces: Iterable[_Piece]) -> str:
    return "".join(piece.text for piece in pieces)
