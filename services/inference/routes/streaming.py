"""The beginning of a streamed answer: everything that can fail before the first token fails with a real status."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from starlette.types import Receive

from services.inference.engine.interface import Token
from services.inference.serving import Ask, Run, Serving
from shared.http.disconnect import while_connected


class Begun:
    """A run whose first token is there; `close` must be awaited in the end."""

    def __init__(self, run: Run, first: Token, rest: AsyncIterator[Token], stack: AsyncExitStack) -> None:
        self.run = run
        self.close = stack.aclose
        self._first, self._rest = first, rest

    async def tokens(self) -> AsyncIterator[Token]:
        """All tokens, the first included. Raises TunesmithError if the engine fails on the request."""
        yield self._first
        async for token in self._rest:
            yield token


async def begin(receive: Receive, serving: Serving, ask: Ask) -> Begun:
    """Start a run and wait for its first token, or for the client to leave.

    Raises:
        ClientDisconnect: the client left.
        TunesmithError: the request was refused, or failed before its first token.
    """
    stack = AsyncExitStack()

    async def first() -> Begun:
        run = await stack.enter_async_context(serving.run(ask))
        tokens = run.tokens()
        return Begun(run, await anext(tokens), tokens, stack)

    try:
        return await while_connected(receive, first())
    except BaseException:
        await stack.aclose()
        raise
