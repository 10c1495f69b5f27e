"""What the generate routes answer, as both services' API documents say it."""

from typing import Any

from pydantic import BaseModel

from shared.http.event_stream import documented_events
from shared.inference_api.openai import ChatCompletionChunkJson, ChatCompletionJson, CompletionJson
from shared.inference_api.tgi import GenerateJson, GenerateListJson, TokenEventJson

Responses = dict[int | str, dict[str, Any]]


def _answers(
    description: str, whole: type[BaseModel], event: type[BaseModel], *, ended_by_done: bool = False
) -> Responses:
    content = documented_events(event, ended_by_done=ended_by_done)
    return {200: {"description": description, "model": whole, "content": content}}


TGI_ANSWERS = _answers(
    "The generated text, with details if asked for; server-sent events of tokens if streamed.",
    GenerateJson,
    TokenEventJson,
)
TGI_LIST_ANSWERS = _answers(
    "The same in a list of one; server-sent events of tokens if streamed.", GenerateListJson, TokenEventJson
)
TGI_STREAM: Responses = {
    200: {"description": "Server-sent events of tokens.", "content": documented_events(TokenEventJson)}
}
CHAT_ANSWERS = _answers(
    "A chat completion; with `stream` server-sent events of its chunks, ended by `[DONE]`.",
    ChatCompletionJson,
    ChatCompletionChunkJson,
    ended_by_done=True,
)
COMPLETION_ANSWERS = _answers(
    "A completion; with `stream` server-sent events of its chunks, ended by `[DONE]`.",
    CompletionJson,
    CompletionJson,
    ended_by_done=True,
)
