"""From a request to its answer, whole or streamed: one way for every dialect.

Everything that can fail before the first token fails with a real status; after that only the stream can tell.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

from fastapi import Request, Response
from pydantic import BaseModel

from services.inference.generation import Candidate, Generation, PromptRequest
from services.inference.routes import headers
from services.inference.serving import Serving
from shared.errors import TunesmithError
from shared.http.disconnect import while_connected
from shared.http.event_stream import EventStreamResponse
from shared.http.web import error_json
from shared.inference_api.ignored import IGNORED_PARAMETERS


class Dialect(Protocol):
    """The shapes of one request's answer. Of what its models hold only the fields that were set are sent."""

    def whole(self, generation: Generation) -> BaseModel:
        """The answer in one piece."""
        ...

    def events(self, generation: Generation, candidate: Candidate) -> Iterable[BaseModel]:
        """The events for a candidate's newest token, or for its end without any; none if there is nothing to tell."""
        ...

    def closing(self, generation: Generation) -> Iterable[BaseModel | str]:
        """What follows the events of all candidates."""
        ...

    def translated(self, error: TunesmithError) -> TunesmithError:
        """The same error, naming the dialect's own field."""
        ...


async def respond(
    request: Request,
    serving: Serving,
    asked: PromptRequest,
    dialect: Dialect,
    *,
    stream: bool,
    ignored: Sequence[str] = (),
) -> Response:
    """Generate and answer.

    Args:
        ignored: fields of the request that were taken and are not acted on; a header names them.

    Raises:
        ClientDisconnect: the client left before the answer began.
        TunesmithError: the request was refused, or failed before its first token.
    """
    try:
        if stream:
            response = await _streamed(request, serving, asked, dialect)
        else:
            response = await while_connected(request.receive, _whole(serving, asked, dialect))
    except TunesmithError as error:
        raise dialect.translated(error) from error
    if ignored:
        response.headers[IGNORED_PARAMETERS] = ",".join(ignored)
    return response


async def _whole(serving: Serving, asked: PromptRequest, dialect: Dialect) -> Response:
    async with serving.generate(asked) as generation:
        async for _ in generation.progress():
            pass
        content = _json(dialect.whole(generation))
        return Response(content, headers=headers.full(generation, serving.base), media_type="application/json")


async def _streamed(request: Request, serving: Serving, asked: PromptRequest, dialect: Dialect) -> Response:
    stack = AsyncExitStack()

    async def begin() -> tuple[Generation, Candidate, AsyncIterator[Candidate]]:
        generation = await stack.enter_async_context(serving.generate(asked))
        progress = generation.progress()
        return generation, await anext(progress), progress

    try:
        generation, first, rest = await while_connected(request.receive, begin())
    except BaseException:
        await stack.aclose()
        raise

    async def events() -> AsyncIterator[str]:
        try:
            for event in dialect.events(generation, first):
                yield _json(event)
            async for candidate in rest:
                for event in dialect.events(generation, candidate):
                    yield _json(event)
            for closing in dialect.closing(generation):
                yield closing if isinstance(closing, str) else _json(closing)
        except TunesmithError as error:
            yield error_json(dialect.translated(error), request.url.path)

    return EventStreamResponse(events(), stack.aclose, headers.early(generation, serving.base))


def _json(content: BaseModel) -> str:
    return content.model_dump_json(exclude_unset=True)
