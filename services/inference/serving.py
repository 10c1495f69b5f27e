"""What the HTTP routes call: a request's prompt, its adapter and the engine, brought together for its lifetime.

Owns the order of things: admission, then the adapter, then the engine, then the release. Knows no HTTP and no torch.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from services.inference.adapters.registry import AdapterRegistry
from services.inference.adapters.residency import Entry
from services.inference.engine.admission import Admission, Permit
from services.inference.engine.grammar import Grammar, Grammars
from services.inference.engine.interface import Engine, GenerationRequest, GrammarText
from services.inference.engine.token_bytes import TokenBytes
from services.inference.generation import Candidate, Generation, PromptRequest, Times
from services.inference.prompts import RawIds, RawText, ids_of, template_of
from services.inference.tool_calls import CallForm, call_form
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


class Observer(Protocol):
    """Counts requests by how they end."""

    def finished(self, generation: Generation) -> None: ...
    def refused(self, code: str) -> None: ...


class Serving:
    """Everything one inference process serves.

    Args:
        slots: sequences that the engine generates at once.
        cuts_new_tokens: whether a request for more new tokens than the context has room for is given what fits; else
            it is refused.
    """

    def __init__(
        self,
        base: ServedBase,
        tokenizer: Tokenizer,
        engine: Engine,
        admission: Admission,
        adapters: AdapterRegistry,
        grammars: Grammars,
        *,
        slots: int,
        cuts_new_tokens: bool = True,
    ) -> None:
        self._grammars, self.slots = grammars, slots
        self.base, self.tokenizer, self.engine, self.adapters = base, tokenizer, engine, adapters
        self.token_bytes = TokenBytes(tokenizer)
        self._admission, self._cuts_new_tokens = admission, cuts_new_tokens
        self._observer: Observer | None = None

    def observe(self, observer: "Observer") -> None:
        """Report to `observer` how requests end."""
        self._observer = observer

    @asynccontextmanager
    async def generate(self, asked: PromptRequest) -> AsyncIterator[Generation]:
        """Generate for one request; if the block ends early it is cancelled, and its slot is free within one step.

        Raises:
            InvalidRequest, NotFound, Overloaded, Unavailable: before anything is generated.
        """
        try:
            async with self._generation(asked) as generation:
                yield generation
                if generation.finished and self._observer:
                    self._observer.finished(generation)
        except TunesmithError as error:
            if self._observer:
                self._observer.refused(error.code)
            raise

    @asynccontextmanager
    async def _generation(self, asked: PromptRequest) -> AsyncIterator[Generation]:
        times = Times()
        # Bounded before anything is read from disk. A prompt's length is known only with the adapter's template.
        hints = [
            min(source.size_hint, self.engine.context) for source in asked.sources for _ in range(asked.candidates)
        ]
        permits = self._admission.acquire_all(hints)
        adapter: Entry | None = None
        load_ms: float | None = None
        handed_over = False
        try:
            if asked.adapter_id is not None:
                adapter, load_ms = await self.adapters.acquire(asked.adapter_id)
            form, grammar_text = self._form_of_answers(asked, adapter)
            grammar = await self._grammars.compiled(grammar_text) if grammar_text else None
            candidates = await self._candidates(asked, adapter, grammar)
            for candidate, permit in zip(candidates, permits, strict=True):
                permit.resize(len(candidate.request.prompt))
            # An adapter may be evicted again once the engine is done with it, which after a cancel is one step later.
            release = partial(self.adapters.release, adapter) if adapter else None
            generation = Generation(
                candidates, adapter, load_ms, times, release, per_prompt=asked.candidates, call_form=form
            )
            times.submitted = time.perf_counter()
            handed_over = True
            handles = self._submit(generation, permits)
        finally:
            if not handed_over:
                for permit in permits:
                    permit.release()
                if adapter is not None:
                    self.adapters.release(adapter)
        try:
            yield generation
        finally:
            for candidate, handle in zip(generation.candidates, handles, strict=True):
                if not candidate.over:
                    self.engine.cancel(handle)

    def _form_of_answers(
        self, asked: PromptRequest, adapter: Entry | None
    ) -> tuple[CallForm | None, GrammarText | None]:
        """How calls are written, if there may be any, and what every answer must follow."""
        if asked.tools is None:
            return None, asked.grammar
        template = template_of(adapter.template if adapter else None, self.tokenizer)
        form = call_form(template, self.tokenizer)
        return form, form.grammar(asked.tools)

    def _submit(self, generation: Generation, permits: list[Permit]) -> list[Any]:
        """Hand all candidates to the engine, or none: those before one that is refused are cancelled."""
        handles: list[Any] = []
        try:
            for candidate, permit in zip(generation.candidates, permits, strict=True):
                handles.append(self.engine.submit(candidate.request, generation.sink(candidate), permit))
        except BaseException:
            for handle in handles:
                self.engine.cancel(handle)
            for permit in permits[len(handles) :]:
                permit.release()
            generation.left_out(len(permits) - len(handles))
            raise
        return handles

    async def _candidates(
        self, asked: PromptRequest, adapter: Entry | None, grammar: Grammar | None
    ) -> list[Candidate]:
        template = adapter.template if adapter else None
        uid = adapter.uid if adapter else None
        # Encoding megabytes takes seconds; what is cut to its end must be encoded whole.
        most = self.engine.context if asked.truncate is None else None
        candidates: list[Candidate] = []
        for prompt, source in enumerate(asked.sources):
            text, ids = await ids_of(source, self.tokenizer, template, most_tokens=most)
            # Whoever lays a prompt out alone may want the format's next turn as well; a grammar has its own end.
            open_end = isinstance(source, RawText | RawIds) or grammar is not None
            ends = () if open_end else template_of(template, self.tokenizer).ends
            for place in range(asked.candidates):
                request = self._complete(asked, asked.candidate(prompt, place), ids, uid)
                candidates.append(Candidate(len(candidates), replace(request, grammar=grammar, ends=ends), text))
        return candidates

    def _complete(
        self, asked: PromptRequest, request: GenerationRequest, ids: list[int], uid: str | None
    ) -> GenerationRequest:
        if asked.truncate is not None:
            ids = ids[-asked.truncate :]
        # An empty text begins as every text does: with the token for that, or after the end of another.
        ids = ids or [self.tokenizer.begin_id]
        new_tokens, room = asked.max_new_tokens, max(1, self.engine.context - len(ids))
        if new_tokens is None:
            new_tokens = min(asked.default_new_tokens, room)
        elif self._cuts_new_tokens:
            new_tokens = min(new_tokens, room)
        return replace(request, prompt=ids, adapter=uid, max_new_tokens=new_tokens, cache_scope=asked.project_tag)

    async def ready(self, within_seconds: float) -> None:
        """Generate a token, unless one came out of the engine in the last `within_seconds`.

        Raises:
            Unavailable: none came within that time.
        """
        last = self.engine.stats().last_token_at
        if last and time.monotonic() - last <= within_seconds:
            return
        candidate = Candidate(0, GenerationRequest([self.tokenizer.eos_id], max_new_tokens=1))
        probe = Generation([candidate])
        try:
            async with asyncio.timeout(within_seconds):
                self.engine.submit(candidate.request, probe.sink(candidate))
                async for _ in probe.progress():
                    pass
        except TimeoutError:
            raise Unavailable("no token came out of the engine in time", code="not_ready") from None

    async def close(self) -> None:
        self._grammars.close()
        await self.adapters.close()
        await asyncio.to_thread(self.engine.close)
