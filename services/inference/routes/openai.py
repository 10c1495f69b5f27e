"""OpenAI's dialect: chat completions, completions, models. `model` names the base or an adapter id."""

import secrets
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from services.inference.engine.interface import GenerationRequest, GrammarText, Sampling
from services.inference.generation import PromptRequest
from services.inference.prompts import ChatSource, RawIds, RawText, plain
from services.inference.routes.dependencies import ClientsModelName, ProjectTag, ServingDep
from services.inference.routes.openai_chat import ChatDialect
from services.inference.routes.openai_completion import CompletionDialect
from services.inference.routes.respond import respond
from services.inference.serving import ServedBase, Serving
from services.inference.tool_calls import ANY, Tools
from shared.errors import InvalidRequest
from shared.inference_api.administration import ServedModelJson, ServedModelListJson
from shared.inference_api.documented import CHAT_ANSWERS, COMPLETION_ANSWERS
from shared.inference_api.fields import MIN_DIVISOR
from shared.inference_api.ignored import take_ignored
from shared.inference_api.openai import (
    CHAT_COMPLETIONS,
    COMPLETIONS,
    NO_MODEL_IN_PARTICULAR,
    ChatCompletionBody,
    CompletionBody,
)

CHAT_NEW_TOKENS, COMPLETION_NEW_TOKENS = 512, 16


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
    if not body.offered_tools:
        return None
    must = ANY if body.must_call else body.chosen_function
    return Tools(
        [tool.written for tool in body.offered_tools],
        frozenset(tool.function.name for tool in body.offered_tools if tool.function.strict),
        must,
        parallel=body.parallel_tool_calls is not False and body.chosen_function is None,
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
