"""What the HTTP routes call: a request's prompt, its adapter and the engine, brought together for its lifetime.

Owns the order of things (permit in the queue → adapter → engine → release) and the bridge from the engine's thread to
the event loop. Knows no HTTP and no torch.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from services.inference.adapters.registry import AdapterRegistry, Entry
from services.inference.engine.admission import Admission
from services.inference.engine.interface import (
    Cancelled,
    Engine,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Started,
    Token,
)
from services.inference.prompts import PromptSource, ids_of
from shared.datasets.tokens import Tokenizer
from shared.errors import TunesmithError, Unavailable


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The one base model of this process.

    Attributes:
        sha256: of its weights; adapters name the one they were trained on.
        precision: what they are held in.
        dtype: what adapters are computed in.
        runner: `llama` or `transformers`, whose forward pass serves.
        measured: what the probe saw of each precision, if it was asked to choose.
    """

    id: str
    aliases: tuple[str, ...]
    revision: str
    sha256: str
    precision: str
    dtype: str
    device: str
    runner: str = "transformers"
    measured: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as a route understood it.

    Attributes:
        adapter_id: None for the base.
        max_new_tokens: None takes what the context leaves, at most `default_new_tokens`.
        truncate: keep only so many of the prompt's last tokens.
        request: sampling, stop strings and so on; its prompt and adapter are filled in here.
    """

    source: PromptSource
    adapter_id: str | None
    request: GenerationRequest
    max_new_tokens: int | None
    default_new_tokens: int = 100
    truncate: int | None = None


@dataclass(slots=True)
class Times:
    """Of one request, `time.perf_counter()` seconds; 0 where it has not come yet."""

    received: float = field(default_factory=time.perf_counter)
    submitted: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class Run:
    """One request being generated.

    Args:
        ended: called on the event loop as soon as the engine is done with the request, however slowly it is read.

    Attributes:
        prompt_text: the formatted prompt; empty if the request gave ids.
        adapter_loaded_in_ms: what the load of its adapter took, whoever waited for it.
        adapter_load_ms: how long the request itself waited for the load; None if the adapter was resident.
        finish: why it ended; None while it goes on, and if it failed.
        over: the engine's last word on it has been heard.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_text: str,
        adapter: Entry | None,
        load_ms: float | None,
        times: Times,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self.request = request
        self.prompt_text = prompt_text
        self.adapter_id = adapter.id if adapter else None
        self.adapter_loaded_in_ms = adapter.load_ms if adapter else 0.0
        self.adapter_load_ms = load_ms
        self.times = times
        self.started: Started | None = None
        self.generated = 0
        self.finish: FinishReason | None = None
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        # As long as its reader is slow: no longer than the context allows tokens.
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def sink(self, event: Event) -> None:
        """Called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._hear, event)
        except RuntimeError:
            # The event loop is gone: the process is ending and nobody can be told.
            return

    def _hear(self, event: Event) -> None:
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


class Observer(Protocol):
    """Who counts requests."""

    def finished(self, run: Run) -> None: ...
    def refused(self, code: str) -> None: ...


class Serving:
    """Everything one inference process serves."""

    def __init__(
        self,
        base: ServedBase,
        tokenizer: Tokenizer,
        engine: Engine,
        admission: Admission,
        adapters: AdapterRegistry,
    ) -> None:
        self.base, self.tokenizer, self.engine, self.adapters = base, tokenizer, engine, adapters
        self._admission = admission
        self._observer: Observer | None = None

    def observe(self, observer: "Observer") -> None:
        """Tell `observer` how requests end."""
        self._observer = observer

    @asynccontextmanager
    async def run(self, ask: Ask) -> AsyncIterator[Run]:
        """Generate for one request; on leaving early it is cancelled and its slot is free within one step.

        Raises:
            InvalidRequest, NotFound, Overloaded, Unavailable: before anything is generated.
        """
        try:
            async with self._run(ask) as run:
                yield run
                if run.finish and self._observer:
                    self._observer.finished(run)
        except TunesmithError as error:
            if self._observer:
                self._observer.refused(error.code)
            raise

    @asynccontextmanager
    async def _run(self, ask: Ask) -> AsyncIterator[Run]:
        times = Times()
        # Bounded before anything is read from disk. The prompt's length is known only with the adapter's template.
        permit = self._admission.acquire(min(ask.source.size_hint, self.engine.context))
        adapter: Entry | None = None
        load_ms: float | None = None
        handed_over = False
        try:
            if ask.adapter_id is not None:
                adapter, load_ms = await self.adapters.acquire(ask.adapter_id)
            text, ids = await ids_of(ask.source, self.tokenizer, adapter.template if adapter else None)
            request = self._complete(ask, ids, adapter.uid if adapter else None)
            # An adapter may be evicted again once the engine is done with it, which after a cancel is one step later.
            release = partial(self.adapters.release, adapter) if adapter else None
            run = Run(request, text, adapter, load_ms, times, release)
            times.submitted = time.perf_counter()
            handle = self.engine.submit(request, run.sink, permit)
            handed_over = True
        finally:
            if not handed_over:
                permit.release()
                if adapter is not None:
                    self.adapters.release(adapter)
        try:
            yield run
        finally:
            if not run.over:
                self.engine.cancel(handle)

    def _complete(self, ask: Ask, ids: list[int], uid: str | None) -> GenerationRequest:
        if ask.truncate is not None:
            ids = ids[-ask.truncate :]
        new_tokens = ask.max_new_tokens
        if new_tokens is None:
            new_tokens = max(1, min(ask.default_new_tokens, self.engine.context - len(ids)))
        return replace(ask.request, prompt=ids, adapter=uid, max_new_tokens=new_tokens)

    async def ready(self, patience: float) -> None:
        """Generate a real token, or know of one not older than `patience` seconds.

        Raises:
            Unavailable: none came in time.
        """
        last = self.engine.stats().last_token_at
        if last and time.monotonic() - last <= patience:
            return
        probe = Run(GenerationRequest([self.tokenizer.eos_id], max_new_tokens=1), "", None, None, Times())
        try:
            async with asyncio.timeout(patience):
                self.engine.submit(probe.request, probe.sink)
                async for _ in probe.tokens():
                    pass
        except TimeoutError:
            raise Unavailable("no token came out of the engine in time", code="not_ready") from None

    async def close(self) -> None:
        await self.adapters.close()
        await asyncio.to_thread(self.engine.close)
