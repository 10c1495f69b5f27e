"""text-generation-inference's dialect, as one superset that its own, LoRAX's and huggingface_hub's clients accept.

`POST /generate` answers an object, `POST /` a list, `/generate_stream` (and `stream: true` anywhere) server-sent
events. Differences from the original on purpose: an unknown adapter is 404, never the base; a stream that fails before
its first token has a real status; special tokens have empty text; log probabilities are the model's own.
"""

import secrets
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from services.inference.engine.interface import GenerationRequest, GrammarText, Sampling, Token
from services.inference.generation import Candidate, Generation, PromptRequest
from services.inference.prompts import ChatSource, InstructionSource, PromptSource, RawText, plain
from services.inference.routes.dependencies import ProjectTag, ServingDep
from services.inference.routes.respond import respond
from services.inference.serving import Serving
from shared.errors import InvalidRequest, TunesmithError
from shared.inference_api.documented import TGI_ANSWERS, TGI_LIST_ANSWERS, TGI_STREAM
from shared.inference_api.ignored import take_ignored
from shared.inference_api.tgi import (
    COMPAT,
    GENERATE,
    GENERATE_STREAM,
    BestOfSequenceJson,
    DetailsJson,
    GenerateBody,
    GenerateJson,
    GenerateListJson,
    Parameters,
    PromptTokenJson,
    SummaryJson,
    TokenEventJson,
    TokenJson,
)


def tgi_router(route_class: type[APIRoute]) -> APIRouter:
    """The generate routes."""
    router = APIRouter(route_class=route_class, tags=["generate"])
    for path, endpoint, answers in (
        (GENERATE, generate, TGI_ANSWERS),
        (GENERATE_STREAM, generate_stream, TGI_STREAM),
        (COMPAT, generate_compat, TGI_LIST_ANSWERS),
    ):
        router.post(path, operation_id=endpoint.__name__, responses=answers)(endpoint)
    return router


async def generate(body: GenerateBody, request: Request, serving: ServingDep, project_tag: ProjectTag) -> Response:
    """Complete a text with the base or an adapter (`parameters.adapter_id`)."""
    return await _respond(request, serving, body, project_tag, stream=bool(body.stream))


async def generate_stream(
    body: GenerateBody, request: Request, serving: ServingDep, project_tag: ProjectTag
) -> Response:
    """The same as server-sent events."""
    return await _respond(request, serving, body, project_tag, stream=True)


async def generate_compat(
    body: GenerateBody, request: Request, serving: ServingDep, project_tag: ProjectTag
) -> Response:
    """The same for clients that post to the bare URL; the answer is a list."""
    return await _respond(request, serving, body, project_tag, stream=bool(body.stream), as_list=True)


async def _respond(
    request: Request, serving: Serving, body: GenerateBody, project_tag: str, *, stream: bool, as_list: bool = False
) -> Response:
    parameters = body.parameters or Parameters()
    if stream and parameters.decoder_input_details:
        raise InvalidRequest("not supported when streaming", param="parameters.decoder_input_details")
    if stream and (parameters.best_of or 1) > 1:
        raise InvalidRequest("more than 1 cannot be streamed: the best is known at the end", param="parameters.best_of")
    dialect = TgiDialect(serving, parameters, as_list=as_list)
    asked = prompt_request(body, project_tag)
    return await respond(request, serving, asked, dialect, stream=stream, ignored=take_ignored(body))


def prompt_request(body: GenerateBody, project_tag: str = "") -> PromptRequest:
    """What the engine is asked for."""
    given = body.parameters or Parameters()
    sampled = given.sampled
    sampling = Sampling(
        do_sample=sampled,
        temperature=given.temperature or 1.0,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty or 1.0,
        typical_p=given.typical_p,
        frequency_penalty=given.frequency_penalty or 0.0,
        seed=(secrets.randbits(63) if given.seed is None else given.seed) if sampled else 0,
    )
    request = GenerationRequest(
        prompt=(),
        sampling=sampling,
        stop=given.stops,
        keep_stop=True,
        ignore_eos=bool(given.ignore_eos_token),
        top_logprobs=given.top_n_tokens or 0,
        prompt_logprobs=bool(given.decoder_input_details),
    )
    limit = 100 if given.max_new_tokens is None else given.max_new_tokens
    return PromptRequest(
        [_source(body)],
        given.adapter_id or None,
        request,
        limit,
        truncate=given.truncate,
        project_tag=project_tag,
        candidates=given.best_of or 1,
        grammar=_grammar(given),
    )


def _grammar(given: Parameters) -> GrammarText | None:
    asked = given.grammar or given.response_format
    grammar = asked.grammar if asked else None
    return GrammarText(*grammar) if grammar else None


def _source(body: GenerateBody) -> PromptSource:
    if body.inputs is not None:
        return RawText(body.inputs)
    if body.instruction is not None:
        return InstructionSource(body.instruction, body.input or "")
    assert body.messages is not None
    return ChatSource(plain(body.messages))


class TgiDialect:
    """Answers as text-generation-inference and LoRAX have them."""

    def __init__(self, serving: Serving, parameters: Parameters, *, as_list: bool = False) -> None:
        self._serving, self._parameters, self._as_list = serving, parameters, as_list

    def whole(self, generation: Generation) -> BaseModel:
        given = self._parameters
        # The first of equals, as text-generation-inference chooses.
        best = max(generation.candidates, key=lambda candidate: candidate.mean_logprob)
        answer = GenerateJson(generated_text=self._text(best))
        # LoRAX and text-generation-inference return details for decoder_input_details too.
        if given.details or given.decoder_input_details or given.top_n_tokens:
            answer.details = self._details(generation, best)
        return GenerateListJson([answer]) if self._as_list else answer

    def events(self, generation: Generation, candidate: Candidate) -> Iterable[BaseModel]:
        token, given = candidate.tokens[-1], self._parameters
        last = token.finish is not None
        event = TokenEventJson(
            index=len(candidate.tokens),
            token=_token(token),
            generated_text=self._text(candidate) if last else None,
            details=SummaryJson(**self._summary(generation, candidate)) if last and given.details else None,
        )
        if given.top_n_tokens:
            event.top_tokens = self._alternatives(token)
        yield event

    def closing(self, generation: Generation) -> Iterable[BaseModel | str]:
        return ()

    def translated(self, error: TunesmithError) -> TunesmithError:
        if error.code != "invalid_grammar":
            return error
        field = "grammar" if self._parameters.grammar else "response_format"
        return InvalidRequest(error.message, param=f"parameters.{field}", code=error.code)

    def _text(self, candidate: Candidate) -> str:
        return (candidate.prompt_text if self._parameters.return_full_text else "") + candidate.text

    def _summary(self, generation: Generation, candidate: Candidate) -> dict[str, Any]:
        prompt = len(candidate.request.prompt)
        return _ending(candidate) | {
            "input_length": prompt,
            "prompt_tokens": prompt,
            "skipped_tokens": 0,
            "model_id": self._serving.base.id,
            "adapter_id": generation.adapter_id,
            "adapter_load_ms": generation.adapter_load_ms,
            "precision": self._serving.base.precision,
        }

    def _details(self, generation: Generation, best: Candidate) -> DetailsJson:
        details = DetailsJson(**self._summary(generation, best), **self._told(best))
        if len(generation.candidates) > 1:
            details.best_of_sequences = [
                BestOfSequenceJson(generated_text=self._text(other), **_ending(other), **self._told(other))
                for other in generation.candidates
                if other is not best
            ]
        return details

    def _told(self, candidate: Candidate) -> dict[str, Any]:
        told: dict[str, Any] = {
            "prefill": self._prefill(candidate),
            "tokens": [_token(token) for token in candidate.tokens],
        }
        if self._parameters.top_n_tokens:
            told["top_tokens"] = [self._alternatives(token) for token in candidate.tokens]
        return told

    def _alternatives(self, token: Token) -> list[TokenJson]:
        return [
            TokenJson(id=other.id, text=self._name(other.id), logprob=other.logprob, special=False, skipped=False)
            for other in token.alternatives
        ]

    def _prefill(self, candidate: Candidate) -> list[PromptTokenJson]:
        if not self._parameters.decoder_input_details or candidate.started is None:
            return []
        logprobs = [None, *candidate.started.prompt_logprobs]
        return [
            PromptTokenJson(id=token, text=self._name(token), logprob=logprob)
            for token, logprob in zip(candidate.request.prompt, logprobs, strict=True)
        ]

    def _name(self, token: int) -> str:
        return self._serving.tokenizer.decode([token], skip_special_tokens=False)


def _token(token: Token) -> TokenJson:
    return TokenJson(id=token.id, text=token.text, logprob=token.logprob, special=token.special, skipped=False)


def _ending(candidate: Candidate) -> dict[str, Any]:
    sampling = candidate.request.sampling
    return {
        "finish_reason": candidate.finish,
        "generated_tokens": len(candidate.tokens),
        "seed": sampling.seed if sampling.do_sample else None,
    }
