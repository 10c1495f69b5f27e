"""One request as a route understood it, and the generation it becomes: its tokens, its times and how it ends.

Owns the bridge from the engine's thread to the event loop. Knows no HTTP and no torch.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from services.inference.adapters.residency import Entry
from services.inference.engine.interface import (
    Cancelled,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Started,
    Token,
)
from services.inference.prompts import PromptSource
from shared.errors import TunesmithError


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A request before its prompt is tokenised and its adapter is loaded.

    Attributes:
        adapter_id: None for the base.
        request: sampling, stop strings and so on; its prompt and adapter are filled in later.
        max_new_tokens: None takes what the context leaves, at most `default_new_tokens`.
        truncate: keep only so many of the prompt's last tokens.
        project_tag: opaque text that is the same for all requests of one project; empty if the gateway sent none.
    """

    source: PromptSource
    adapter_id: str | None
    request: GenerationRequest
    max_new_tokens: int | None
    default_new_tokens: int = 100
    truncate: int | None = None
    project_tag: str = ""


@dataclass(slots=True)
class Times:
    """Of one generation, `time.perf_counter()` seconds; 0 where it has not come yet."""

    received: float = field(default_factory=time.perf_counter)
    submitted: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class Generation:
    """One request in the engine.

    Args:
        ended: called on the event loop as soon as the engine is done with the request, however slowly it is read.

    Attributes:
        prompt_text: the formatted prompt; empty if the request gave ids.
        adapter_loaded_in_ms: what the load of its adapter took, whoever waited for it.
        adapter_load_ms: how long the request itself waited for the load; None if the adapter was resident.
        generated: tokens read so far.
        finish: why it ended; None while it goes on, and if it failed.
        over: the engine's last event has been read.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_text: str = "",
        adapter: Entry | None = None,
        load_ms: float | None = None,
        times: Times | None = None,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self.request = request
        self.prompt_text = prompt_text
        self.adapter_id = adapter.id if adapter else None
        self.adapter_loaded_in_ms = adapter.load_ms if adapter else 0.0
        self.adapter_load_ms = load_ms
        self.times = times or Times()
        self.started: Started | None = None
        self.generated = 0
        self.finish: FinishReason | None = None
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        # Unbounded, for the engine never waits for a reader; the context bounds how many tokens there can be.
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def sink(self, event: Event) -> None:
        """Take an event over. Called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._receive, event)
        except RuntimeError:
            # The event loop is closed: the process is ending and nobody reads any more.
            return

    def _receive(self, event: Event) -> None:
        self._events.put_nowait(event)
        if self._ended and isinstance(event, Finished | Failed | Cancelled):
            self._ended()

    async def tokens(self) -> AsyncIterator[Token]:
        """The tokens as they come.

        Raises:
            TunesmithError: the engine failed on this request.
        """
        while not self.over:
            event = await self._events.get()
            self.over = isinstance(event, Finished | Failed | Cancelled)
            if isinstance(event, Token):
                self.generated += 1
                self.finish = event.finish
                self.times.last_token = time.perf_counter()
                self.times.first_token = self.times.first_token or self.times.last_token
                yield event
            elif isinstance(event, Started):
                self.started = event
                self.times.started = time.perf_counter()
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Cancelled):
                raise TunesmithError("the request was cancelled", code="cancelled")
