"""One request as a route understood it, and the generation it becomes: its candidates, its times and how it ends.

A request has several prompts or asks for several answers to each; every such pair is a candidate, a sequence of its own
in the engine. Owns the bridge from the engine's thread to the event loop. Knows no HTTP and no torch.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from services.inference.adapters.residency import Entry
from services.inference.engine.interface import (
    Cancelled,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    GrammarText,
    Sink,
    Started,
    Token,
)
from services.inference.prompts import PromptSource
from services.inference.tool_calls import CallForm, Tools
from shared.errors import TunesmithError


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A request before its prompts are tokenised and its adapter is loaded.

    Attributes:
        sources: the prompts, at least one.
        adapter_id: None for the base.
        request: sampling, stop strings and so on; its prompt and adapter are filled in later.
        max_new_tokens: None takes what the context leaves, at most `default_new_tokens`.
        truncate: keep only so many of each prompt's last tokens.
        project_tag: opaque text that is the same for all requests of one project; empty if the gateway sent none.
        candidates: how many sequences each prompt becomes.
        seeded: the client chose the seed: then a prompt gets the same answers whether it comes alone or with others.
            Else each prompt has a seed of its own.
        grammar: what every answer must follow; with tools, what `tools` says of that.
        tools: functions that the answer may call.
    """

    sources: Sequence[PromptSource]
    adapter_id: str | None
    request: GenerationRequest
    max_new_tokens: int | None
    default_new_tokens: int = 100
    truncate: int | None = None
    project_tag: str = ""
    candidates: int = 1
    seeded: bool = True
    grammar: GrammarText | None = None
    tools: Tools | None = None

    def candidate(self, prompt: int, place: int) -> GenerationRequest:
        """What the candidate at `place` of a prompt asks of the engine; the first of all has the request's own seed."""
        seed = derived_seed(self.request.sampling.seed, 0 if self.seeded else prompt, place)
        return replace(self.request, sampling=replace(self.request.sampling, seed=seed))


def derived_seed(seed: int, prompt: int, place: int) -> int:
    """A seed below 2^63 for one of several sequences: always the same, and `seed` itself for the first."""
    if not prompt and not place:
        return seed
    digest = hashlib.sha256(f"{seed} {prompt} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(slots=True)
class Times:
    """Of one generation, `time.perf_counter()` seconds; 0 where it has not come yet."""

    received: float = field(default_factory=time.perf_counter)
    submitted: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(slots=True, eq=False)
class Candidate:
    """One sequence of a generation.

    Attributes:
        index: its place among all of the generation: those of the first prompt first.
        prompt_text: the formatted prompt; empty if the request gave ids.
        tokens: generated and read so far.
        finish: why it ended; None while it goes on.
        over: the engine's last event for it has been read.
    """

    index: int
    request: GenerationRequest
    prompt_text: str = ""
    started: Started | None = None
    tokens: list[Token] = field(default_factory=list)
    finish: FinishReason | None = None
    over: bool = False

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, natural; 0 if there are none."""
        return sum(token.logprob for token in self.tokens) / max(1, len(self.tokens))


class Generation:
    """One request in the engine.

    Args:
        candidates: all that the engine is to generate, by prompt.
        per_prompt: how many of them each prompt has.
        call_form: how calls are written in their texts; None if no tools were offered.
        ended: called on the event loop as soon as the engine is done with all of them, however slowly they are read.

    Attributes:
        adapter_loaded_in_ms: what the load of its adapter took, whoever waited for it.
        adapter_load_ms: how long the request itself waited for the load; None if the adapter was resident.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        adapter: Entry | None = None,
        load_ms: float | None = None,
        times: Times | None = None,
        ended: Callable[[], None] | None = None,
        *,
        per_prompt: int = 1,
        call_form: CallForm | None = None,
    ) -> None:
        self.call_form = call_form
        self.candidates = list(candidates)
        self.per_prompt = per_prompt
        self.adapter_id = adapter.id if adapter else None
        self.adapter_loaded_in_ms = adapter.load_ms if adapter else 0.0
        self.adapter_load_ms = load_ms
        self.times = times or Times()
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        self._in_engine = len(self.candidates)
        # Unbounded, for the engine never waits for a reader; the context bounds how many tokens there can be.
        self._events: asyncio.Queue[tuple[Candidate, Event]] = asyncio.Queue()

    @property
    def over(self) -> bool:
        """Whether the engine's last events have been read."""
        return all(candidate.over for candidate in self.candidates)

    @property
    def finished(self) -> bool:
        """Whether all candidates ended well."""
        return all(candidate.finish for candidate in self.candidates)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(candidate.request.prompt) for candidate in self.candidates[:: self.per_prompt])

    @property
    def generated(self) -> int:
        """Tokens read so far, of all candidates."""
        return sum(len(candidate.tokens) for candidate in self.candidates)

    @property
    def queue_seconds(self) -> float:
        """Until the last of the candidates that have started left the queue."""
        return max((each.started.queue_seconds for each in self.candidates if each.started), default=0.0)

    def sink(self, candidate: Candidate) -> Sink:
        """What takes the candidate's events over from the engine's thread."""
        return partial(self._take, candidate)

    def left_out(self, count: int) -> None:
        """Note that so many candidates were never handed to the engine."""
        self._in_engine -= count
        if self._ended and not self._in_engine:
            self._ended()

    def _take(self, candidate: Candidate, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._receive, candidate, event)
        except RuntimeError:
            # The event loop is closed: the process is ending and nobody reads any more.
            return

    def _receive(self, candidate: Candidate, event: Event) -> None:
        self._events.put_nowait((candidate, event))
        if isinstance(event, Finished | Failed | Cancelled):
            self.left_out(1)

    async def progress(self) -> AsyncIterator[Candidate]:
        """The candidates as they get on: each time one has a new token, or has ended without any.

        Raises:
            TunesmithError: the engine failed on one of them.
        """
        while not self.over:
            candidate, event = await self._events.get()
            candidate.over = isinstance(event, Finished | Failed | Cancelled)
            now = time.perf_counter()
            if isinstance(event, Token):
                candidate.tokens.append(event)
                candidate.finish = event.finish
                self._mark(now)
                yield candidate
            elif isinstance(event, Started):
                candidate.started = event
                self.times.started = self.times.started or now
            elif isinstance(event, Finished):
                candidate.finish = event.reason
                if not candidate.tokens:
                    self._mark(now)
                    yield candidate
            elif isinstance(event, Failed):
                raise event.error
            else:
                raise TunesmithError("the request was cancelled", code="cancelled")

    def _mark(self, now: float) -> None:
        self.times.last_token = now
        self.times.first_token = self.times.first_token or now
